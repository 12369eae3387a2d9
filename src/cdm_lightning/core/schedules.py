"""Sigma schedules of rollouts and of sampling, as plain tensors: K steps have K + 1 sigmas, from 1 down to 0.

A model family shifts sigmas towards noise (SD3: 3 s / (1 + 2 s)). `space` says what the arguments of a schedule mean:
"before_shift" (values as in the paper, to which the shift is then applied) or "after_shift" (values as the network is
given them). The returned sigmas are always the values that the network is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from cdm_lightning.core.lengths import LengthDistribution
from cdm_lightning.core.rng import StepRandom

Shift = Callable[[Tensor], Tensor]
Space = Literal["before_shift", "after_shift"]


class SigmaSchedule(Protocol):
    """The interface of a schedule that draws the sigmas of one rollout."""

    @property
    def mean_length(self) -> float:
        """The expected number of steps K, for the planner."""

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Draw the sigmas (B, K + 1), float32, strictly decreasing from 1 to 0, with the same K in every process.

        They are drawn and shifted on the host and then moved to the device once, so that the host never waits for the device.
        """


@dataclass(frozen=True)
class RandomSchedule:
    """CDM's dynamic continuous schedule.

    It draws K from `length`, and for each sample K - 1 sigmas from U(sigma_min, sigma_max), which are sorted. With
    `stratified`, there is one draw in each of K - 1 equal bins instead (as in LightX2V). The defaults are those published
    for SD3-Medium. The authors draw the sigmas once in each process; here each sample has its own sigmas, whatever the
    number of processes.
    """

    length: LengthDistribution
    sigma_min: float = 0.25
    sigma_max: float = 0.95
    stratified: bool = False
    space: Space = "before_shift"

    def __post_init__(self) -> None:
        check_space(self.space)
        if not 0 < self.sigma_min < self.sigma_max <= 1:
            raise ValueError(f"need 0 < sigma_min < sigma_max <= 1, got {self.sigma_min} and {self.sigma_max}")

    @property
    def mean_length(self) -> float:
        """The expected number of steps."""
        return float(self.length.mean)

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Draw the sigmas (B, K + 1), float32, as the network is given them, strictly decreasing from 1 to 0."""
        inner = self.length.sample(rng.shared("schedule.length")) - 1
        u = rng.uniform("schedule.sigmas", inner)
        if self.stratified:
            u = (torch.arange(inner, device="cpu") + u) / max(inner, 1)
        sigmas = self.sigma_min + (self.sigma_max - self.sigma_min) * u
        return rng.place(_with_ends(sigmas.sort(dim=1, descending=True).values, shift, self.space))


@dataclass(frozen=True)
class FixedSchedule:
    """The same steps in every rollout, as in DMD; the default is the 4-step inference schedule of CDM."""

    sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25)
    space: Space = "before_shift"

    def __post_init__(self) -> None:
        check_space(self.space)
        falling = all(a > b for a, b in zip(self.sigmas, [*self.sigmas[1:], 0.0]))
        if not self.sigmas or self.sigmas[0] != 1 or not falling:
            raise ValueError(f"sigmas must decrease strictly from 1 and stay above 0, got {list(self.sigmas)}")

    @property
    def mean_length(self) -> float:
        """The number of steps."""
        return float(len(self.sigmas))

    def sample(self, rng: StepRandom, shift: Shift) -> Tensor:
        """Return the sigmas (B, K + 1), float32, as the network is given them: the same row B times."""
        inner = torch.tensor(self.sigmas[1:], dtype=torch.float32, device="cpu")
        return rng.place(_with_ends(inner.repeat(len(rng), 1), shift, self.space))


def uniform_sigmas(nfe: int) -> Tensor:
    """Return the unshifted sigmas 1, 1 - 1/nfe, ..., 1/nfe of inference with `nfe` network calls: (nfe,) float32."""
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, got {nfe}")
    return (torch.arange(nfe, 0, -1, dtype=torch.float64) / nfe).float()


def inference_sigmas(nfe: int, shift: Shift) -> Tensor:
    """Return the sigmas of inference as the network is given them, with the final 0: (nfe + 1,) float32."""
    return torch.cat([shift(uniform_sigmas(nfe)), torch.zeros(1)])


def check_space(space: str) -> None:
    """Raise ValueError for an unknown space."""
    if space not in get_args(Space):
        raise ValueError(f"space must be one of {', '.join(get_args(Space))}, got {space!r}")


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
