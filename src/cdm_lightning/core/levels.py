"""Distributions of the sigma to which a sample is noised again during training, before networks are called on it.

`ceiling` (B,) is the sigma at which the sample was predicted; a distribution may ignore it. Sigmas are drawn and shifted
on the host, and moved to the device once. Results are clamped to [low, high] and not rescaled, as the authors of CDM do;
about 2 % of uniform draws are therefore at each end. Results are the values that the network is given. `space` says
whether the shift of the model family is applied to the draw (before the clamp).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.schedules import Shift, Space, check_space


class SigmaLevels(Protocol):
    """The interface of a distribution that draws one sigma for each sample."""

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw the sigmas (B,), float32, as the network is given them."""


@dataclass(frozen=True)
class UniformLevels:
    """U(0, 1), clamped: the paper's choice for DM, CDM and the fake score. The paper applies no shift to these sigmas."""

    low: float = 0.02
    high: float = 0.98
    space: Space = "after_shift"

    def __post_init__(self) -> None:
        _check(self.low, self.high, self.space)

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw the sigmas (B,), float32, as the network is given them."""
        return rng.place(_seen(rng.uniform(purpose), self.space, shift).clamp(self.low, self.high))


@dataclass(frozen=True)
class CappedUniformLevels:
    """U(0, ceiling), clamped: the paper's choice for CA. The ceiling is already a shifted sigma, so no shift is applied."""

    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        _check(self.low, self.high, "after_shift")

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw the sigmas (B,), float32, as the network is given them."""
        return (rng.place(rng.uniform(purpose)) * ceiling).clamp(self.low, self.high)


@dataclass(frozen=True)
class LogitNormalLevels:
    """The sigmoid of a normal draw, clamped. With mean 0 and std 1 it is the training density of SD3 (arXiv:2403.03206)."""

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
        """Draw the sigmas (B,), float32, as the network is given them."""
        draws = (self.mean + self.std * rng.gaussian(purpose)).sigmoid()
        return rng.place(_seen(draws, self.space, shift).clamp(self.low, self.high))


def _seen(draws: Tensor, space: Space, shift: Shift) -> Tensor:
    return shift(draws) if space == "before_shift" else draws


def _check(low: float, high: float, space: str) -> None:
    check_space(space)
    if not 0 < low < high < 1:
        raise ValueError(f"need 0 < low < high < 1, got {low} and {high}")
