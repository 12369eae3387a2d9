"""Sigma schedules of rollouts and of inference. K steps have K + 1 sigmas, from 1 down to 0.

A model family shifts sigmas towards noise (for SD3, sigma s becomes 3 s / (1 + 2 s)). The option `space` says whether
the configured sigmas are still to be shifted ("before_shift", as in papers) or are shifted already ("after_shift"). A
schedule always returns shifted sigmas, which are those at which the network is called. The classes raise ValueError for
arguments with which the sigmas would not decrease.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, get_args

import torch
from torch import Tensor

from cdm_lightning.core.lengths import LengthDistribution
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.kinds import NotEmpty, Sigma

Shift = Callable[[Tensor], Tensor]  # sigmas -> shifted sigmas of the same shape, at which the network is called
Space = Literal["before_shift", "after_shift"]


class SigmaSchedule(Protocol):
    """The interface of a sigma schedule, which draws the sigmas of the rollouts of an iteration."""

    @property
    def mean_length(self) -> float:
        """The expected number of steps K; `cdm_lightning.plan` computes the cost of a run from it."""

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Draw the sigmas (B, K + 1), float32, on the device of `rng`, strictly decreasing from 1 to 0.

        K is the same in all processes. `shift` is the model family's timestep shift. It is applied on the CPU, before
        the sigmas are moved to the device, so that the host never waits for the device.
        """


@dataclass(frozen=True)
class RandomSchedule:
    """CDM's dynamic continuous schedule (arXiv:2605.06376): a random number of steps K at random sigmas.

    `length` is the distribution from which K is drawn. The first sigma of a sample is 1 and the last is 0. The K - 1
    sigmas between them are drawn from U(sigma_min, sigma_max) and sorted. With `stratified`, the interval from
    `sigma_min` to `sigma_max` is cut into K - 1 equal parts and one sigma is drawn from each part, as in LightX2V's
    code of CDM.

    The defaults are the published values for SD3-Medium. CDM's authors draw one set of sigmas for all samples of a
    process; here each sample has a set of its own.
    """

    length: LengthDistribution
    sigma_min: Sigma = 0.25
    sigma_max: Sigma = 0.95
    stratified: bool = False
    space: Space = "before_shift"

    def __post_init__(self) -> None:
        check_space(self.space)
        if not 0 < self.sigma_min < self.sigma_max <= 1:
            raise ValueError(
                f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must satisfy 0 < sigma_min < sigma_max <= 1"
            )

    @property
    def mean_length(self) -> float:
        """The expected number of steps K."""
        return float(self.length.mean)

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Draw the sigmas (B, K + 1), float32, on the device of `rng`, strictly decreasing from 1 to 0."""
        inner = self.length.sample(rng.shared("schedule.length")) - 1
        u = rng.uniform("schedule.sigmas", inner)
        if self.stratified:
            u = (torch.arange(inner, device="cpu") + u) / max(inner, 1)
        sigmas = self.sigma_min + (self.sigma_max - self.sigma_min) * u
        return rng.place(_with_ends(sigmas.sort(dim=1, descending=True).values, shift, self.space))


@dataclass(frozen=True)
class FixedSchedule:
    """The same sigmas in every rollout, as in DMD. The default is CDM's 4-step inference schedule (arXiv:2605.06376).

    `sigmas` are the sigmas at which the K steps begin. `sample` appends a 0 to them, at which the last step ends.
    """

    sigmas: Annotated[Sequence[Sigma], NotEmpty] = (1.0, 0.75, 0.5, 0.25)
    space: Space = "before_shift"

    def __post_init__(self) -> None:
        check_space(self.space)
        falling = all(a > b for a, b in zip(self.sigmas, [*self.sigmas[1:], 0.0]))
        if not self.sigmas or self.sigmas[0] != 1 or not falling:
            raise ValueError(
                f"sigmas={list(self.sigmas)} must start at 1, decrease strictly and stay above 0; the final 0 is added"
            )

    @property
    def mean_length(self) -> float:
        """The number of steps K."""
        return float(len(self.sigmas))

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Return the sigmas (B, K + 1), float32, on the device of `rng`. All B rows are equal."""
        inner = torch.tensor(self.sigmas[1:], dtype=torch.float32, device="cpu")
        return rng.place(_with_ends(inner.repeat(len(rng), 1), shift, self.space))


def uniform_sigmas(nfe: int) -> Tensor:
    """Return the unshifted sigmas 1, 1 - 1/nfe, ..., 1/nfe of inference in `nfe` steps: (nfe,), float32.

    Raises ValueError for `nfe` below 1.
    """
    if nfe < 1:
        raise ValueError(f"nfe={nfe}, the number of steps, must be at least 1")
    return (torch.arange(nfe, 0, -1, dtype=torch.float64) / nfe).float()


def inference_sigmas(nfe: int, shift: Shift) -> Tensor:
    """Return the shifted sigmas of inference in `nfe` steps, with the final 0: (nfe + 1,), float32.

    Raises ValueError for `nfe` below 1.
    """
    return torch.cat([shift(uniform_sigmas(nfe)), torch.zeros(1)])


def constant_shift(factor: float) -> Shift:
    """Return the timestep shift of SD3: it maps sigma s to f s / (1 + (f - 1) s), where f is `factor`.

    With a factor of 1, sigmas do not change. Source: Esser et al., arXiv:2403.03206, equation 23. Raises ValueError for
    a factor that is not positive.
    """
    if not factor > 0:
        raise ValueError(f"the factor of a shift must be positive, got {factor}")
    return lambda sigmas: factor * sigmas / (1 + (factor - 1) * sigmas)


def check_space(space: str) -> None:
    """Raise ValueError unless `space` is "before_shift" or "after_shift"."""
    if space not in get_args(Space):
        raise ValueError(f"space={space!r} must be one of {', '.join(get_args(Space))}")


def _with_ends(inner: Tensor, shift: Shift, space: Space) -> Tensor:
    """Add the ends 1 and 0 to the decreasing inner sigmas (B, K - 1): (B, K + 1).

    With "before_shift", the inner sigmas are shifted first.
    """
    seen = shift(inner) if space == "before_shift" and inner.numel() else inner  # a single step has no inner sigmas
    one, zero = inner.new_ones(len(inner), 1), inner.new_zeros(len(inner), 1)
    return torch.cat([_strictly_decreasing(torch.cat([one, seen], dim=1)), zero], dim=1)


def _strictly_decreasing(sigmas: Tensor) -> Tensor:
    """Return the decreasing sigmas (B, n), with equal neighbours set apart by the smallest float32 step.

    The sigmas are positive and float32. Two of 28 draws are equal in about one of 50,000 samples. Positive floats have
    the same order as their bit patterns read as integers, so the bit patterns are compared.
    """
    bits = sigmas.contiguous().view(torch.int32).long()
    place = torch.arange(bits.shape[1], device=bits.device)
    return ((bits + place).cummin(dim=1).values - place).int().view(torch.float32)
