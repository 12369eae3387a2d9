"""Extract the LoRA nearest to the difference of a tuned network and its base, by truncated singular value decompositions."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Extraction:
    """The LoRA that approximates the difference (tuned network - base), and how much of that difference it misses.

    `tensors` holds the factors of each linear layer that differs, "LAYER.lora_A.weight" (r, in) and "LAYER.lora_B.weight"
    (out, r), in float32 on the CPU. Add their product B A to the base's weight with scale 1. `norms` maps the name of every
    tensor that differs to two Frobenius norms: that of its difference, and that of the part which the LoRA misses.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def errors(self) -> Iterator[tuple[str, float]]:
        """Yield (name, error) for each tensor that differs: norm of the missed part / norm of the difference, 1 if all is missed."""
        for name, (whole, lost) in self.norms.items():
            yield name, lost / whole

    @property
    def error(self) -> float:
        """Norm of the missed part / norm of the difference, over all tensors together: in [0, 1], and 0 if nothing differs."""
        whole, lost = (math.sqrt(sum(pair[i] ** 2 for pair in self.norms.values())) for i in (0, 1))
        return lost / whole if whole else 0.0

    @property
    def outside(self) -> list[str]:
        """The names of tensors that differ but that a LoRA of linear layers cannot hold, such as biases and norms."""
        return [name for name in self.norms if f"{name.removesuffix('.weight')}.lora_A.weight" not in self.tensors]


def extract(pairs: Iterable[tuple[str, Tensor, Tensor, bool]], rank: int, device: torch.device | str) -> Extraction:
    """Return the LoRA that is nearest, layer by layer, to the difference (tuned network - base), computed in float32.

    `pairs` yields (name, tensor of the base, tensor of the tuned network, whether it is the weight of a linear layer) for
    each tensor. Only weights of linear layers get factors, of rank min(`rank`, out, in); differences of other tensors are
    only measured. `device` is where the decompositions run.
    """
    found = Extraction()
    for name, base, tuned, is_linear in pairs:
        difference = tuned.to(device, torch.float32) - base.to(device, torch.float32)
        whole = float(difference.norm())
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
    """Factorize `difference` (out, in): return A (r, in), B (out, r) and the norm of (difference - B A), r = min(rank, out, in).

    B A is the truncated singular value decomposition, the nearest matrix of rank r (Eckart and Young, 1936). Each factor
    contains the square roots of the singular values, so that A and B have equal norms.
    """
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    roots = values[:rank].sqrt()
    return (
        (roots[:, None] * right[:rank]).contiguous(),
        (left[:, :rank] * roots).contiguous(),
        float(values[rank:].norm()),
    )
