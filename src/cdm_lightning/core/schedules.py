"""Sigma schedules of rollouts and of inference, as plain tensors: K steps have K + 1 sigmas, from 1 down to 0.

A model family shifts sigmas towards noise (SD3: 3 s / (1 + 2 s)). `space` says in which values the sigmas of a schedule are
configured: "before_shift" (as in papers; the shift is then applied) or "after_shift" (as the network is given them). The
returned sigmas are always those that the network is given. Classes raise ValueError for arguments that give no such sigmas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, get_args

import torch
from torch import Tensor

from cdm_lightning.core.lengths import LengthDistribution
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.kinds import NotEmpty, Sigma

Shift = Callable[[Tensor], Tensor]  # unshifted sigmas -> the sigmas that the network is given, of the same shape
Space = Literal["before_shift", "after_shift"]


class SigmaSchedule(Protocol):
    """The interface of a schedule, which draws the sigmas of the rollouts of an iteration."""

    @property
    def mean_length(self) -> float:
        """The expected number of steps K, from which `cdm_lightning.plan` computes the cost of a run."""

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Draw the sigmas (B, K + 1), float32, on the device, strictly decreasing from 1 to 0, with the same K in every process.

        They are drawn and shifted on the CPU and then moved once, so that the host never waits for the device.
        """


@dataclass(frozen=True)
class RandomSchedule:
    """CDM's dynamic continuous schedule (arXiv:2605.06376): a random number of steps at random sigmas.

    It draws K from `length`, and for each sample K - 1 sigmas from U(sigma_min, sigma_max), which are sorted and put between
    1 and 0. With `stratified`, there is instead one draw in each of K - 1 equal bins (as in LightX2V's code of CDM). The
    defaults are those published for SD3-Medium. The authors draw the sigmas once per process; here each sample has its own.
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
        """The expected number of steps."""
        return float(self.length.mean)

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Draw the sigmas (B, K + 1), float32, on the device, strictly decreasing from 1 to 0."""
        inner = self.length.sample(rng.shared("schedule.length")) - 1
        u = rng.uniform("schedule.sigmas", inner)
        if self.stratified:
            u = (torch.arange(inner, device="cpu") + u) / max(inner, 1)
        sigmas = self.sigma_min + (self.sigma_max - self.sigma_min) * u
        return rng.place(_with_ends(sigmas.sort(dim=1, descending=True).values, shift, self.space))


@dataclass(frozen=True)
class FixedSchedule:
    """The same sigmas in every rollout, as in DMD; the default is the 4-step inference schedule of CDM (arXiv:2605.06376).

    `sigmas` are those at which the student is called, without the final 0.
    """

    sigmas: Annotated[Sequence[Sigma], NotEmpty] = (1.0, 0.75, 0.5, 0.25)
    space: Space = "before_shift"

    def __post_init__(self) -> None:
        check_space(self.space)
        falling = all(a > b for a, b in zip(self.sigmas, [*self.sigmas[1:], 0.0]))
        if not self.sigmas or self.sigmas[0] != 1 or not falling:
            raise ValueError(
                f"sigmas={list(self.sigmas)} must decrease strictly from 1 and stay above 0 (the end is added)"
            )

    @property
    def mean_length(self) -> float:
        """The number of steps."""
        return float(len(self.sigmas))

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Return the sigmas (B, K + 1), float32, on the device: the same row B times."""
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


def check_space(space: str) -> None:
    """Raise ValueError unless `space` is "before_shift" or "after_shift"."""
    if space not in get_args(Space):
        raise ValueError(f"space={space!r} must be one of {', '.join(get_args(Space))}")


def _with_ends(inner: Tensor, shift: Shift, space: Space) -> Tensor:
    """Shift the decreasing inner sigmas (B, K - 1) where `space` asks for it, and add 1 and 0 at the ends: (B, K + 1)."""
    seen = shift(inner) if space == "before_shift" and inner.numel() else inner  # a single step has no inner sigmas
    one, zero = inner.new_ones(len(inner), 1), inner.new_zeros(len(inner), 1)
    return torch.cat([_strictly_decreasing(torch.cat([one, seen], dim=1)), zero], dim=1)


def _strictly_decreasing(sigmas: Tensor) -> Tensor:
    """Return the decreasing positive float32 sigmas (B, n) with equal neighbours separated by one unit in the last place.

    In float32, two of 28 draws are equal in about one of 50,000 samples. Positive floats have the same order as their bits,
    so the comparison is made on the bits.
    """
    bits = sigmas.contiguous().view(torch.int32).long()
    place = torch.arange(bits.shape[1], device=bits.device)
    return ((bits + place).cummin(dim=1).values - place).int().view(torch.float32)
