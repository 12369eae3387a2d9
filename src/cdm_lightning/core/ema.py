"""Move the parameters of one network towards those of another, for the student's EMA and the merge into the fake score."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def lerp_parameters_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """Set target <- (1 - weight) target + weight source, in place, for each parameter of the source.

    Parameters that only the target has (those of additional inputs) are not changed. Raises ValueError if the target
    lacks a parameter of the source. If the networks are sharded, each rank moves its own shards. The target and the
    source may be on different devices.
    """
    to, of = dict(target.named_parameters()), dict(source.named_parameters())
    if lacking := of.keys() - to.keys():
        raise ValueError(f"the networks have different parameters: the target lacks {sorted(lacking)[:3]}")
    targets = [local(to[name]) for name in of]
    sources = [local(value).to(target.device) for value, target in zip(of.values(), targets)]
    torch._foreach_lerp_(targets, sources, weight)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor (a view of it); a plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warmed_up_decay(step: int, decay: float) -> float:
    """Return the decay after `step` updates: min(decay, (1 + step) / (10 + step)), the warm-up of the authors of CDM."""
    return min(decay, (1 + step) / (10 + step))
