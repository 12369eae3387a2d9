"""Extract the LoRA nearest to the difference of a tuned network and its base, by truncated singular value decompositions."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Extraction:
    """A LoRA that was extracted, and how much of the difference of the two networks it lacks.

    `tensors` are the factors A and B of linear layers, "LAYER.lora_A.weight" (r, in) and "LAYER.lora_B.weight" (out, r), whose
    product B A is to be added with scale 1. `norms` has, for each tensor that differs, the Frobenius norms of its difference
    and of the part of it that the factors do not hold.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def errors(self) -> Iterator[tuple[str, float]]:
        """Yield (name, lost norm / norm of the difference) for each tensor that differs; the ratio is 1 if it has no factors."""
        for name, (whole, lost) in self.norms.items():
            yield name, lost / whole

    @property
    def error(self) -> float:
        """The lost norm divided by the norm of the difference, over all tensors together: in [0, 1]; 0 if nothing differs."""
        whole, lost = (math.sqrt(sum(pair[i] ** 2 for pair in self.norms.values())) for i in (0, 1))
        return lost / whole if whole else 0.0

    @property
    def outside(self) -> list[str]:
        """The names of tensors that differ but are not in the LoRA, since it has linear layers only: biases, norms, ..."""
        return [name for name in self.norms if f"{name.removesuffix('.weight')}.lora_A.weight" not in self.tensors]


def extract(pairs: Iterable[tuple[str, Tensor, Tensor, bool]], rank: int, device: torch.device | str) -> Extraction:
    """Return the nearest LoRA of at most `rank` to the difference of two networks, computed in float32 on `device`.

    `pairs` has for each tensor (name, tensor of the base, tensor of the tuned network, whether it is the weight of a linear
    layer).
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
    """Return factors A (r, in) and B (out, r) of `difference` (out, in), and the norm of difference - B A; r = min(rank, out, in).

    B A is the nearest matrix of rank r, the truncated singular value decomposition (Eckart and Young, 1936). Both factors get
    the square roots of the singular values, so that they have equal norms.
    """
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    roots = values[:rank].sqrt()
    return (
        (roots[:, None] * right[:rank]).contiguous(),
        (left[:, :rank] * roots).contiguous(),
        float(values[rank:].norm()),
    )
