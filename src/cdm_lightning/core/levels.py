"""Distributions of the sigma to which a loss noises a sample before it calls a network.

All classes draw one sigma for each sample and clamp it to [low, high], as the code of CDM's authors does. Of uniform draws with
the bounds 0.02 and 0.98, 2 % therefore become `low` and 2 % become `high`. The network is called at the clamped sigma. With
`space="before_shift"`, the model family's timestep shift (for SD3, sigma s becomes 3 s / (1 + 2 s)) is applied to the draw before
the clamp; with "after_shift" it is not. Sigmas are drawn on the CPU and moved to the device once. All
classes raise ValueError for an argument out of its range.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.schedules import Shift, Space, check_space
from cdm_lightning.kinds import Finite, InnerSigma, Positive


class SigmaLevels(Protocol):
    """The interface of a distribution of sigmas, one for each sample."""

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw the sigmas (B,), float32, on the device.

        `purpose` names the draw: the same name gives the same sigmas. `ceiling` (B,) is the sigma at which the student predicted
        the sample that is noised; a distribution may ignore it. `shift` is the model family's timestep shift.
        """


@dataclass(frozen=True)
class UniformLevels:
    """U(0, 1), clamped to [low, high]. CDM (arXiv:2605.06376) uses it to train the fake score and for two loss terms.

    These terms are DM (distribution matching) and CDM (distribution matching off the student's trajectory). The paper applies no
    timestep shift to these sigmas.
    """

    low: InnerSigma = 0.02
    high: InnerSigma = 0.98
    space: Space = "after_shift"

    def __post_init__(self) -> None:
        _check(self.low, self.high, self.space)

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw the sigmas (B,), float32, on the device. `SigmaLevels.sample` explains the arguments."""
        return rng.place(_seen(rng.uniform(purpose), self.space, shift).clamp(self.low, self.high))


@dataclass(frozen=True)
class CappedUniformLevels:
    """U(0, ceiling), clamped to [low, high]. CDM (arXiv:2605.06376) uses it for its loss term CA (guidance augmentation).

    `ceiling` is the sigma at which the student predicted the sample. A sample is noised to a lower sigma than this, or to `low`
    if the draw is below `low`. `ceiling` is already shifted, so the draw is not shifted again.
    """

    low: InnerSigma = 0.02
    high: InnerSigma = 0.98

    def __post_init__(self) -> None:
        _check(self.low, self.high, "after_shift")

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw the sigmas (B,), float32, on the device. `SigmaLevels.sample` explains the arguments."""
        return (rng.place(rng.uniform(purpose)) * ceiling).clamp(self.low, self.high)


@dataclass(frozen=True)
class LogitNormalLevels:
    """The sigmoid of a normal draw, clamped to [low, high]. SD3 was trained with mean 0 and std 1 (arXiv:2403.03206)."""

    mean: Finite = 0.0
    std: Positive = 1.0
    low: InnerSigma = 0.02
    high: InnerSigma = 0.98
    space: Space = "after_shift"

    def __post_init__(self) -> None:
        _check(self.low, self.high, self.space)
        if not self.std > 0:
            raise ValueError(f"std={self.std} must be positive")

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw the sigmas (B,), float32, on the device. `SigmaLevels.sample` explains the arguments."""
        draws = (self.mean + self.std * rng.gaussian(purpose)).sigmoid()
        return rng.place(_seen(draws, self.space, shift).clamp(self.low, self.high))


def _seen(draws: Tensor, space: Space, shift: Shift) -> Tensor:
    return shift(draws) if space == "before_shift" else draws


def _check(low: float, high: float, space: str) -> None:
    check_space(space)
    if not 0 < low < high < 1:
        raise ValueError(f"low={low} and high={high} must satisfy 0 < low < high < 1")
