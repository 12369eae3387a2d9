"""Extract a LoRA from a tuned network, by truncated singular value decomposition of its difference from the base network."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cdm_lightning.errors import UserError


@dataclass
class Extraction:
    """A LoRA that approximates the difference (tuned network - base), and the error of the approximation.

    `tensors` holds float32 CPU tensors "LAYER.lora_A.weight" (r, in) and "LAYER.lora_B.weight" (out, r) for each linear
    layer that differs. The LoRA adds their product B A to the base's weight, with scale 1. `norms` maps the name of
    each tensor that differs to two Frobenius norms: the norm of its difference, and the norm of the part of the
    difference that the LoRA misses.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def errors(self) -> Iterator[tuple[str, float]]:
        """Yield (name, relative error) for each tensor that differs.

        The relative error is the second norm in `norms` divided by the first.
        """
        for name, (whole, lost) in self.norms.items():
            yield name, lost / whole

    @property
    def error(self) -> float:
        """The relative error over all tensors together, in [0, 1]; it is 0 if nothing differs.

        It is the norm of all that the LoRA misses, divided by the norm of all differences.
        """
        whole, lost = (math.sqrt(sum(pair[i] ** 2 for pair in self.norms.values())) for i in (0, 1))
        return lost / whole if whole else 0.0

    @property
    def outside(self) -> list[str]:
        """The names of tensors that differ but cannot be part of a LoRA of linear layers, such as biases."""
        return [name for name in self.norms if f"{name.removesuffix('.weight')}.lora_A.weight" not in self.tensors]


def extract(pairs: Iterable[tuple[str, Tensor, Tensor, bool]], rank: int, device: torch.device | str) -> Extraction:
    """Approximate the difference (tuned network - base) by a LoRA, layer by layer, in float32.

    `pairs` yields (name, base tensor, tuned tensor, is_linear) for each tensor of the networks. The last entry says
    whether the tensor is the weight of a linear layer. Such a weight gets the LoRA factors of rank min(`rank`, out, in)
    that are nearest to the difference. For other tensors only the difference is measured. The decompositions run on
    `device`. Raises UserError for a difference that is not finite.
    """
    found = Extraction()
    for name, base, tuned, is_linear in pairs:
        difference = tuned.to(device, torch.float32) - base.to(device, torch.float32)
        whole = float(difference.norm())
        if not math.isfinite(whole):
            raise UserError(
                f"the tensors {name} of --base and --tuned differ by infinity or NaN, because one of these pipelines "
                "is damaged; download or export both again"
            )
        if whole == 0:
            continue
        lost = whole
        if is_linear:
            a, b, lost = truncated_factors(difference, rank)
            layer = name.removesuffix(".weight")
            found.tensors |= {f"{layer}.lora_A.weight": a.cpu(), f"{layer}.lora_B.weight": b.cpu()}
        found.norms[name] = (whole, lost)
    return found


def truncated_factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factorize `difference` (out, in) into A (r, in) and B (out, r); the third result is the norm of (difference - B A).

    The rank r is min(rank, out, in). B A is the truncated singular value decomposition, the nearest matrix of rank r (Eckart and
    Young, 1936). A and B have equal norms, because each contains the square roots of the singular values.
    """
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    roots = values[:rank].sqrt()
    return (
        (roots[:, None] * right[:rank]).contiguous(),
        (left[:, :rank] * roots).contiguous(),
        float(values[rank:].norm()),
    )
