"""The LoRA nearest to what training changed: truncated singular value decompositions of weight differences."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Extraction:
    """Factors of linear layers, and for every tensor that differs the norms of its difference and of what is lost.

    `tensors` are "LAYER.lora_A.weight" (rank, in) and "LAYER.lora_B.weight" (out, rank), scale 1; norms are Frobenius.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def errors(self) -> Iterator[tuple[str, float]]:
        """(tensor, what is lost / its difference) for each tensor that differs; 1 where no factors can hold it."""
        for name, (whole, lost) in self.norms.items():
            yield name, lost / whole

    @property
    def error(self) -> float:
        """The same over all tensors together; 0 if nothing differs."""
        whole, lost = (math.sqrt(sum(pair[i] ** 2 for pair in self.norms.values())) for i in (0, 1))
        return lost / whole if whole else 0.0

    @property
    def outside(self) -> list[str]:
        """The tensors that differ and that a LoRA of linear layers cannot hold: biases, norms, convolutions."""
        return [name for name in self.norms if f"{name.removesuffix('.weight')}.lora_A.weight" not in self.tensors]


def extract(pairs: Iterable[tuple[str, Tensor, Tensor, bool]], rank: int, device: torch.device | str) -> Extraction:
    """The best factors of at most `rank` for each (name, base, tuned, is a linear layer's weight) that differs."""
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
    """A (r, in), B (out, r) with B A the nearest matrix of rank r = min(rank, out, in), and the norm of what is left.

    Eckart and Young, 1936: cut the singular value decomposition; each factor takes the roots of the singular values.
    """
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    roots = values[:rank].sqrt()
    return (
        (roots[:, None] * right[:rank]).contiguous(),
        (left[:, :rank] * roots).contiguous(),
        float(values[rank:].norm()),
    )
