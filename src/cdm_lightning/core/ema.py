"""Moving one network's parameters towards another's: the student's moving average, the merge into the fake score."""

import torch
from torch import nn


@torch.no_grad()
def lerp_parameters_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """target <- (1 - weight) target + weight source, in place, for each parameter; ValueError if names differ."""
    to, of = dict(target.named_parameters()), dict(source.named_parameters())
    if to.keys() != of.keys():
        raise ValueError(f"the networks differ in parameters: {sorted(to.keys() ^ of.keys())[:3]}")
    torch._foreach_lerp_(list(to.values()), [of[name] for name in to], weight)


def warmed_up_decay(step: int, decay: float) -> float:
    """The decay after `step` updates: min(decay, (1 + step) / (10 + step)), as the authors of CDM warm it up."""
    return min(decay, (1 + step) / (10 + step))
