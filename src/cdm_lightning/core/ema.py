"""Move the weights of one network towards those of another.

The EMA of the student is updated in this way. CDM (arXiv:2605.06376) also moves the fake score a little towards the student.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def lerp_parameters_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """Set target <- (1 - weight) target + weight source, in place, for each parameter of the source, by name.

    Buffers, and parameters that only the target has, stay unchanged. The two networks may be on different devices. If they are
    sharded, both must be sharded in the same way, and each rank moves its own shards. Raises ValueError if the target lacks a
    parameter of the source.
    """
    to, of = dict(target.named_parameters()), dict(source.named_parameters())
    if lacking := of.keys() - to.keys():
        raise ValueError(
            f"the target lacks parameters of the source, such as {sorted(lacking)[:3]}; give equal networks"
        )
    targets = [local(to[name]) for name in of]
    sources = [local(value) for value in of.values()]
    if all(target.device == source.device for target, source in zip(targets, sources)):
        torch._foreach_lerp_(targets, sources, weight)
        return
    for to_move, towards in zip(targets, sources):  # one at a time: copies of all would take the memory of a network
        to_move.lerp_(towards.to(to_move.device), weight)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a `DTensor`, as a view. A plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warmed_up_decay(step: int, decay: float) -> float:
    """Return the EMA decay after `step` earlier updates: min(decay, (1 + step) / (10 + step)).

    The decay is low at the start, so that the EMA soon forgets its initial weights. The authors of CDM use the same formula.
    """
    return min(decay, (1 + step) / (10 + step))
