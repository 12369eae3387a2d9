"""Extract the LoRA nearest to the weight changes of a training, by truncated singular value decompositions."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Extraction:
    """The factors of linear layers, and two norms for every tensor that differs between the base and the tuned network.

    `tensors` are "LAYER.lora_A.weight" (rank, in) and "LAYER.lora_B.weight" (out, rank), for scale 1. `norms` are the
    Frobenius norms of a tensor's difference, and of the part of it that the factors do not hold.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def errors(self) -> Iterator[tuple[str, float]]:
        """Yield (tensor, lost norm / norm of the difference) for each tensor that differs; 1 if it has no factors."""
        for name, (whole, lost) in self.norms.items():
            yield name, lost / whole

    @property
    def error(self) -> float:
        """The lost norm / norm of the difference over all tensors together; 0 if nothing differs."""
        whole, lost = (math.sqrt(sum(pair[i] ** 2 for pair in self.norms.values())) for i in (0, 1))
        return lost / whole if whole else 0.0

    @property
    def outside(self) -> list[str]:
        """The tensors that differ but cannot be in a LoRA of linear layers: biases, norms, convolutions."""
        return [name for name in self.norms if f"{name.removesuffix('.weight')}.lora_A.weight" not in self.tensors]


def extract(pairs: Iterable[tuple[str, Tensor, Tensor, bool]], rank: int, device: torch.device | str) -> Extraction:
    """Return the best factors of at most `rank` for each tensor that differs.

    `pairs` are (name, base tensor, tuned tensor, whether it is the weight of a linear layer).
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
    """Return A (r, in) and B (out, r), and the norm of difference - B A, where r = min(rank, out, in).

    B A is the nearest matrix of rank r, the truncated singular value decomposition (Eckart and Young, 1936). Each factor is
    multiplied by the square roots of the singular values.
    """
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    roots = values[:rank].sqrt()
    return (
        (roots[:, None] * right[:rank]).contiguous(),
        (left[:, :rank] * roots).contiguous(),
        float(values[rank:].norm()),
    )
