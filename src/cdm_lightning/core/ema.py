"""Moving one network's parameters towards another's: the student's moving average, the merge into the fake score."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def lerp_parameters_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """target <- (1 - weight) target + weight source, in place, for each parameter of the source.

    Parameters that the target alone has (inputs of its own) stay as they are; ValueError if it lacks one of the source's.
    Of sharded networks each rank moves its own shards; a target may lie on another device than the source.
    """
    to, of = dict(target.named_parameters()), dict(source.named_parameters())
    if lacking := of.keys() - to.keys():
        raise ValueError(f"the networks differ in parameters, the first lacks {sorted(lacking)[:3]}")
    targets = [local(to[name]) for name in of]
    sources = [local(value).to(target.device) for value, target in zip(of.values(), targets)]
    torch._foreach_lerp_(targets, sources, weight)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (a view of it); a plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warmed_up_decay(step: int, decay: float) -> float:
    """The decay after `step` updates: min(decay, (1 + step) / (10 + step)), as the authors of CDM warm it up."""
    return min(decay, (1 + step) / (10 + step))
