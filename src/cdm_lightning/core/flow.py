"""Rectified flow: x_sigma = (1 - sigma) x0 + sigma noise, and the fields that predict its velocity, noise - x0.

Sigma runs from 1 (pure noise) to 0 (data). Shapes: B samples of shape * = (C, H, W); sigma is (B,) or 0-d.
`move` is the only dynamics: the Euler step, the clean prediction and CDM's off-trajectory point are all one `move`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = Tensor | slice  # samples of a batch: their numbers (M,), or consecutive ones


def per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """Sigma (B,) as (B, 1, 1, 1), to multiply `x` (B, *); a 0-d sigma passes through."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noised sample (1 - sigma) x0 + sigma noise, (B, *)."""
    sigma = per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def move(x: Tensor, v: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
    """Along the velocity `v` in a straight line: x + (sigma_to - sigma_from) v, (B, *).

    In the float order of `FlowMatchEulerDiscreteScheduler.step` of diffusers, which it equals bit for bit.
    """
    return x + per_sample(sigma_to - sigma_from, x) * v


def denoise(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that (x, v) at sigma points to, (B, *): `move` to sigma 0."""
    return move(x, v, sigma, torch.zeros_like(sigma))


class VelocityField(ABC):
    """A function (x (B, *), sigma (B,)) -> velocity (B, *) that has text, guidance and precision bound already."""

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity noise - x0 at x (B, *) and sigma (B,), as (B, *)."""

    def select(self, rows: Rows) -> "VelocityField":
        """The field of some samples of its batch; a field that treats all samples alike is its own."""
        return self

    def join(self, others: Sequence["VelocityField"]) -> "VelocityField | None":
        """One field for the concatenated batches of self and `others`, or None where one call cannot serve them all."""
        return None

    def given(self, **inputs: Tensor) -> "VelocityField":
        """The field with a value (B,) for each input that its network has beside x, sigma and text.

        Raises ValueError for a field whose network has no inputs of its own.
        """
        raise ValueError(f"{type(self).__name__} has no inputs of its own, it was given {', '.join(inputs)}")

    def with_features(self, x: Tensor, sigma: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The velocity (B, *), and the hidden states (B, N, D) after the network's blocks with these numbers.

        A negative number counts from the last block. Raises ValueError for a field that is no network, UserError for a block
        that the network does not have.
        """
        raise ValueError(f"{type(self).__name__} has no blocks whose hidden states could be returned")


@dataclass(frozen=True)
class FunctionField(VelocityField):
    """A plain function (x, sigma) -> velocity that treats every sample alike, as a field."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity (B, *) at x (B, *) and sigma (B,)."""
        return self.function(x, sigma)

    def join(self, others: Sequence[VelocityField]) -> VelocityField | None:
        """Itself, if the others wrap the same function."""
        same = all(isinstance(other, FunctionField) and other.function is self.function for other in others)
        return self if same else None


def plain_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + scale (c - u) of velocities (B, *); scale 1 is none."""
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class GuidedField(VelocityField):
    """Classifier-free guidance by `guide`, both halves in one network call; at scale 1 only `cond` is called."""

    cond: VelocityField
    uncond: VelocityField
    scale: float
    guide: Callable[[Tensor, Tensor, float], Tensor] = plain_guidance

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided velocity (B, *) at x (B, *) and sigma (B,)."""
        if self.scale == 1:
            return self.cond(x, sigma)
        # unconditional half first, as the pipelines of diffusers do: the order decides the float rounding of a batch
        uncond, cond = evaluate_together([(self.uncond, x, sigma), (self.cond, x, sigma)])
        return self.guide(cond, uncond, self.scale)

    def select(self, rows: Rows) -> VelocityField:
        """The guided field of some samples."""
        return GuidedField(self.cond.select(rows), self.uncond.select(rows), self.scale, self.guide)


def predict_x0(field: VelocityField, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample (B, *) that `field` predicts at (x, sigma), in float32 whatever the field computes in."""
    return denoise(x.float(), field(x, sigma).float(), sigma)


def evaluate_together(calls: Sequence[tuple[VelocityField, Tensor, Tensor]]) -> list[Tensor]:
    """Velocities of the calls (field, x (B, *), sigma (B,)) in their order, with one network call for all that join."""
    results: dict[int, Tensor] = {}
    pending = list(range(len(calls)))
    while pending:
        group, field = _first_group(calls, pending)
        sizes = [len(calls[i][1]) for i in group]
        x, sigma = torch.cat([calls[i][1] for i in group]), torch.cat([calls[i][2] for i in group])
        results.update(zip(group, field(x, sigma).split(sizes)))
        pending = [i for i in pending if i not in group]
    return [results[i] for i in range(len(calls))]


def _first_group(
    calls: Sequence[tuple[VelocityField, Tensor, Tensor]], pending: list[int]
) -> tuple[list[int], VelocityField]:
    """The first pending call and all that join it, with their common field."""
    first, *rest = (calls[i][0] for i in pending)
    field = first.join(rest) if rest else first  # usually all of them: tried first, since joining copies conditioning
    if field is not None:
        return pending, field
    group, field = [pending[0]], first
    for i in pending[1:]:
        joined = first.join([calls[j][0] for j in [*group[1:], i]])
        if joined is not None:
            group, field = [*group, i], joined
    return group, field
