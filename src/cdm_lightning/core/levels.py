"""Draws of the sigma at which networks look at a re-noised sample during training.

`ceiling` (B,) is the sigma at which the sample was predicted; a distribution uses it or not. Draws are made and shifted on the
host and moved to the device once. Results are clamped to
[low, high], not rescaled, as the authors of CDM do: about 2 % of uniform draws lie on each end. Results are as the
network sees them; `space` says whether the family's shift is applied to the draw (before the clamp).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.schedules import Shift, Space, check_space


class SigmaLevels(Protocol):
    """Anything that draws one sigma a sample."""

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """(B,) float32 as the network sees them."""


@dataclass(frozen=True)
class UniformLevels:
    """U(0, 1), clamped: the paper's choice of sigma for DM, CDM and the fake score, which it does not shift."""

    low: float = 0.02
    high: float = 0.98
    space: Space = "after_shift"

    def __post_init__(self) -> None:
        _check(self.low, self.high, self.space)

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """(B,) draws."""
        return rng.place(_seen(rng.uniform(purpose), self.space, shift).clamp(self.low, self.high))


@dataclass(frozen=True)
class CappedUniformLevels:
    """U(0, ceiling), clamped: the paper's choice for CA. A network saw the ceiling, so no shift applies."""

    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        _check(self.low, self.high, "after_shift")

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """(B,) draws."""
        return (rng.place(rng.uniform(purpose)) * ceiling).clamp(self.low, self.high)


@dataclass(frozen=True)
class LogitNormalLevels:
    """Sigmoid of a normal draw, clamped: the training density of SD3 (arXiv:2403.03206) at mean 0 and std 1."""

    mean: float = 0.0
    std: float = 1.0
    low: float = 0.02
    high: float = 0.98
    space: Space = "after_shift"

    def __post_init__(self) -> None:
        _check(self.low, self.high, self.space)
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """(B,) draws."""
        draws = (self.mean + self.std * rng.gaussian(purpose)).sigmoid()
        return rng.place(_seen(draws, self.space, shift).clamp(self.low, self.high))


def _seen(draws: Tensor, space: Space, shift: Shift) -> Tensor:
    return shift(draws) if space == "before_shift" else draws


def _check(low: float, high: float, space: str) -> None:
    check_space(space)
    if not 0 < low < high < 1:
        raise ValueError(f"need 0 < low < high < 1, got {low} and {high}")
