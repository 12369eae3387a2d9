"""Closed-form networks: they stand for the student, the teacher and the fake score, and record their calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cdm_lightning.core.flow import Rows, VelocityField, per_sample


class Call(NamedTuple):
    """What a network was asked, and whether gradients were on."""

    x: Tensor  # (B, *)
    sigma: Tensor  # (B,)
    offset: Tensor  # (B,)
    with_grad: bool


@dataclass(eq=False)
class Network:
    """A clean prediction x0(x (B, *), sigma (B,)) as a velocity network that records its calls."""

    x0: Callable[[Tensor, Tensor], Tensor]
    calls: list[Call] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor, offset: Tensor) -> Tensor:
        self.calls.append(Call(x.detach(), sigma, offset, torch.is_grad_enabled()))
        return (x - self.x0(x, sigma) - per_sample(offset, x)) / per_sample(sigma, x)

    @property
    def batches(self) -> list[int]:
        """The batch size of each call."""
        return [len(call.x) for call in self.calls]


@dataclass(eq=False)
class BatchField(VelocityField):
    """A network with one number of conditioning a sample (B,), which is added to its clean prediction."""

    network: Network
    offset: Tensor

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert len(x) == len(sigma) == len(self.offset)
        return self.network(x, sigma, self.offset)

    def select(self, rows: Rows) -> "BatchField":
        return BatchField(self.network, self.offset[rows])

    def join(self, others: Sequence[VelocityField]) -> "BatchField | None":
        if not all(isinstance(other, BatchField) and other.network is self.network for other in others):
            return None
        return BatchField(self.network, torch.cat([self.offset, *(other.offset for other in others)]))


def point_mass(value: float, batch: int) -> BatchField:
    """The field of data that are `value` in every element: its clean prediction is `value` everywhere."""
    return BatchField(Network(lambda x, sigma: value + 0 * x), torch.zeros(batch))
