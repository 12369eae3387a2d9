"""Rectified flow: noised samples x = (1 - sigma) x0 + sigma noise, and fields that predict the velocity `noise - x0`.

Sigma runs from 1 (pure noise) to 0 (data). Shapes: B samples of shape * = (C, H, W); sigma is (B,) or 0-d. The function
`move` follows a velocity in a straight line to another sigma. It serves for Euler steps, for x0 predictions (moves to
sigma 0), and for reaching the points off the student's trajectory that CDM needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = Tensor | slice  # which samples of a batch: their indices (M,), or a slice of consecutive samples


def per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshape sigma (B,) to (B, 1, 1, 1), so that it can multiply x (B, *). A 0-d sigma is returned unchanged."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the noised sample (1 - sigma) x0 + sigma noise, (B, *)."""
    sigma = per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def move(x: Tensor, v: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
    """Move x (B, *) from `sigma_from` to `sigma_to` along the velocity v: x + (sigma_to - sigma_from) v.

    The order of the operations is the same as in `FlowMatchEulerDiscreteScheduler.step` of diffusers, so the results are equal
    bit for bit.
    """
    return x + per_sample(sigma_to - sigma_from, x) * v


def denoise(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return x0 = x - sigma v (B, *), the clean sample that the velocity v predicts. This is a `move` to sigma 0."""
    return move(x, v, sigma, torch.zeros_like(sigma))


class VelocityField(ABC):
    """A function (x (B, *), sigma (B,)) -> velocity (B, *): a network together with the text and guidance of one batch."""

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the predicted velocity noise - x0 (B, *) at x (B, *) and sigma (B,)."""

    def select(self, rows: Rows) -> "VelocityField":
        """Return the field for only some samples of its batch, with the texts of these samples.

        `rows` holds the indices (M,) of the samples, or is a slice. The default returns the field itself, which is
        right for a field that does not depend on texts.
        """
        return self

    def join(self, others: Sequence["VelocityField"]) -> "VelocityField | None":
        """Return one field for the concatenated batches of this field and `others`, in this order, or None.

        One network call then computes the velocities of all these batches. The result is None if this is not possible,
        for example because the fields have different networks. The default always returns None.
        """
        return None

    def given(self, **inputs: Tensor) -> "VelocityField":
        """Return this field with values for additional inputs of its network.

        `inputs` maps the name of an input to its values (B,). Additional inputs are those that the network gets besides
        x, sigma and text. An objective declares them in `Role.inputs` (`objectives.base`). Raises ValueError if the
        network has no input of that name.
        """
        raise ValueError(
            f"{type(self).__name__} has no input {', '.join(inputs)}; declare it in inputs of the network's Role"
        )

    def precise(self) -> "VelocityField":
        """Return this field without `compute.fp8`, the option by which calls without a gradient compute in 8 bits.

        Losses use the result where they subtract nearly equal velocities of two calls, because 8 bits are too coarse
        there. The default returns the field itself.
        """
        return self

    def with_features(self, x: Tensor, sigma: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return the velocity (B, *) and the hidden states (B, N, D) after each block in `blocks`.

        N is the number of tokens and D their width. `blocks` are indices of transformer blocks; negative indices count
        from the last block. Raises ValueError if the field was not made from a network, and UserError for a block that
        does not exist or is not used by the network.
        """
        raise ValueError(f"{type(self).__name__} has no blocks, so no hidden states; use the field of a network")


@dataclass(frozen=True)
class FunctionField(VelocityField):
    """A velocity field made from a plain function (x (B, *), sigma (B,)) -> velocity (B, *), without text."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity (B, *) at x (B, *) and sigma (B,)."""
        return self.function(x, sigma)

    def join(self, others: Sequence[VelocityField]) -> VelocityField | None:
        """Return this field if all `others` have the same function, otherwise None.

        The field itself is the joined field, because its function accepts a batch of any size.
        """
        same = all(isinstance(other, FunctionField) and other.function is self.function for other in others)
        return self if same else None


def plain_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Return the velocity (B, *) of classifier-free guidance: uncond + scale (cond - uncond). Scale 1 means no guidance."""
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class GuidedField(VelocityField):
    """A field with classifier-free guidance: `guide` combines the velocities of the fields `cond` and `uncond`.

    `cond` predicts with text and `uncond` without. One network call computes both velocities if the two fields can be
    joined. At scale 1 only `cond` is called.
    """

    cond: VelocityField
    uncond: VelocityField
    scale: float
    guide: Callable[[Tensor, Tensor, float], Tensor] = plain_guidance

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the guided velocity (B, *) at x (B, *) and sigma (B,)."""
        if self.scale == 1:
            return self.cond(x, sigma)
        # The unconditional half comes first, as in the pipelines of diffusers: the order affects the rounding of floats.
        uncond, cond = evaluate_together([(self.uncond, x, sigma), (self.cond, x, sigma)])
        return self.guide(cond, uncond, self.scale)

    def select(self, rows: Rows) -> VelocityField:
        """Return this field for only the samples `rows` of its batch. `rows` holds their indices (M,), or is a slice."""
        return GuidedField(self.cond.select(rows), self.uncond.select(rows), self.scale, self.guide)


def predict_x0(field: VelocityField, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the x0 (B, *) that the field predicts at x (B, *) and sigma (B,). The result is always float32."""
    return denoise(x.float(), field(x, sigma).float(), sigma)


def evaluate_together(calls: Sequence[tuple[VelocityField, Tensor, Tensor]]) -> list[Tensor]:
    """Return the velocity (B, *) of each call (field, x (B, *), sigma (B,)), in the order of `calls`.

    Calls whose fields can be joined (`VelocityField.join`) share one network call. B may differ between calls.
    """
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
    """Return the numbers of the first pending call and of all calls that can be joined with it, and their joined field."""
    first, *rest = (calls[i][0] for i in pending)
    field = first.join(rest) if rest else first  # usually all can be joined; one join copies less text than many
    if field is not None:
        return pending, field
    group, field = [pending[0]], first
    for i in pending[1:]:
        joined = first.join([calls[j][0] for j in [*group[1:], i]])
        if joined is not None:
            group, field = [*group, i], joined
    return group, field
