"""Check that the stored tensors of a network fit the network that will load them.

Names and shapes must be equal, and a tensor must be floating-point in both or in neither.
"""

from collections.abc import Mapping

from torch import Tensor

from cdm_lightning.checkpoint.stored import OTHER, StoredCheckpoint
from cdm_lightning.errors import UserError

Shapes = Mapping[str, tuple[tuple[int, ...], bool]]  # name: the shape, and whether the tensor is floating-point


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return {name: (shape, whether the tensor is floating-point)}."""
    return {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in tensors.items()}


def require_fit(stored: StoredCheckpoint, network: str, expected: Shapes) -> None:
    """Raise `UserError` unless the tensors of `network` in a checkpoint have the names and shapes in `expected`.

    `network` is a name such as "student", and `expected` is a result of `shapes_of`. The precision of floating-point
    tensors may differ. Only the headers of the checkpoint's files are read.
    """
    prefix = f"networks.{network}."
    found = {name.removeprefix(prefix): of for name, of in stored.sizes.items() if name.startswith(prefix)}
    if not found:
        raise UserError(f"{stored.path} has no network {network}; pass --weights auto, or {OTHER}")
    for name in sorted(found.keys() | expected.keys()):
        if flaw := _flaw(name, found, expected):
            raise UserError(f"{stored.path}: the tensor {prefix}{name:.200} {flaw}; {OTHER}")


def _flaw(name: str, found: Mapping[str, tuple], expected: Shapes) -> str | None:
    """Return what is wrong with the stored tensor `name`, for a message, or None if nothing is wrong."""
    if name not in found:
        return "is missing"
    if name not in expected:
        return "belongs to another network than the configuration describes"
    (shape, dtype), (own, is_floating) = found[name], expected[name]
    if tuple(shape) != own:
        return f"has the shape {list(shape)} instead of {list(own)}"
    if dtype.is_floating_point != is_floating:
        return f"holds {str(dtype).removeprefix('torch.')} instead of {'floating-point' if is_floating else 'whole'} numbers"
    return None
