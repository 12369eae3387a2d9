"""Move the weights of one network towards those of another.

Two things need it: the student's EMA, and the averaging of a little of the student into the fake score (CDM, arXiv:2605.06376).
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def lerp_parameters_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """Set target <- (1 - weight) target + weight source, in place, for each parameter of the source, by name.

    Buffers, and parameters that only the target has, are not changed. Raises ValueError if the target lacks a parameter of
    the source. If the networks are sharded, both must be sharded alike, and each rank moves its own shards. The two networks
    may be on different devices.
    """
    to, of = dict(target.named_parameters()), dict(source.named_parameters())
    if lacking := of.keys() - to.keys():
        raise ValueError(f"the networks have different parameters: the target lacks {sorted(lacking)[:3]}")
    targets = [local(to[name]) for name in of]
    sources = [local(value) for value in of.values()]
    if all(target.device == source.device for target, source in zip(targets, sources)):
        torch._foreach_lerp_(targets, sources, weight)
        return
    for to_move, towards in zip(targets, sources):  # one at a time: copies of all would take the memory of a network
        to_move.lerp_(towards.to(to_move.device), weight)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a `DTensor`, as a view; a plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warmed_up_decay(step: int, decay: float) -> float:
    """Return the EMA decay to use after `step` earlier updates: min(decay, (1 + step) / (10 + step)), as the authors of CDM do.

    The low decays at the start make the EMA forget the weights that it started from.
    """
    return min(decay, (1 + step) / (10 + step))
