"""Distributions of the sigmas at which losses call networks.

A loss draws one sigma for each sample, noises the sample to this sigma and calls a network on the noised sample. All
classes clamp the drawn sigmas to [low, high], as the code of CDM's authors does. With uniform draws and the bounds 0.02
and 0.98, for example, 2 % of the sigmas are `low` and 2 % are `high`.

The option `space` of some classes says whether a draw still needs the model family's timestep shift ("before_shift") or
counts as shifted already ("after_shift"). For SD3, the shift turns sigma s into 3 s / (1 + 2 s). With "before_shift",
the draw is shifted and then clamped. With "after_shift", it is only clamped.

Sigmas are drawn on the CPU, and those of a batch are moved to the device in one copy. All classes raise ValueError for
an argument out of its range.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.schedules import Shift, Space, check_space
from cdm_lightning.kinds import Finite, InnerSigma, Positive


class SigmaLevels(Protocol):
    """The interface of a distribution from which a loss draws one sigma for each sample."""

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw one sigma for each of B samples: (B,), float32, on the device of `rng`.

        `purpose` is the name of the draw. Another draw from `rng` with the same name gives the same sigmas. `ceiling`
        (B,) contains the sigmas at which the student predicted the samples. Of the classes in this module,
        only `CappedUniformLevels` uses it. `shift` is the model family's timestep shift.
        """


@dataclass(frozen=True)
class UniformLevels:
    """A uniform draw from [0, 1) for each sample, clamped to [low, high].

    The paper of CDM (arXiv:2605.06376) uses this distribution to train the fake score, and to compute the loss terms DM
    (distribution matching) and CDM (distribution matching off the student's trajectory). The paper applies no timestep
    shift to these sigmas.
    """

    low: InnerSigma = 0.02
    high: InnerSigma = 0.98
    space: Space = "after_shift"

    def __post_init__(self) -> None:
        _check(self.low, self.high, self.space)

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw one sigma for each of B samples: (B,), float32, on the device of `rng`.

        `SigmaLevels.sample` explains the arguments. `ceiling` is ignored.
        """
        return rng.place(_seen(rng.uniform(purpose), self.space, shift).clamp(self.low, self.high))


@dataclass(frozen=True)
class CappedUniformLevels:
    """A uniform draw from [0, ceiling) for each sample, clamped to [low, high].

    `ceiling` is an argument of `sample`: the sigma at which the student predicted the sample. The clamped draw is lower
    than `ceiling` if `ceiling` is above `low`; otherwise it is `low`. The timestep shift is already contained in
    `ceiling`, so it is not applied to the draw. CDM (arXiv:2605.06376) uses this distribution in its loss term CA
    (guidance augmentation).
    """

    low: InnerSigma = 0.02
    high: InnerSigma = 0.98

    def __post_init__(self) -> None:
        _check(self.low, self.high, "after_shift")

    def sample(self, rng: StepRandom, purpose: str, ceiling: Tensor, shift: Shift) -> Tensor:
        """Draw one sigma for each of B samples: (B,), float32, on the device of `rng`.

        `SigmaLevels.sample` explains the arguments. `shift` is ignored.
        """
        return (rng.place(rng.uniform(purpose)) * ceiling).clamp(self.low, self.high)


@dataclass(frozen=True)
class LogitNormalLevels:
    """The sigmoid of a normal draw with `mean` and `std` for each sample, clamped to [low, high].

    SD3 was trained with `mean` 0 and `std` 1 (arXiv:2403.03206).
    """

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
        """Draw one sigma for each of B samples: (B,), float32, on the device of `rng`.

        `SigmaLevels.sample` explains the arguments. `ceiling` is ignored.
        """
        draws = (self.mean + self.std * rng.gaussian(purpose)).sigmoid()
        return rng.place(_seen(draws, self.space, shift).clamp(self.low, self.high))


def _seen(draws: Tensor, space: Space, shift: Shift) -> Tensor:
    return shift(draws) if space == "before_shift" else draws


def _check(low: float, high: float, space: str) -> None:
    check_space(space)
    if not 0 < low < high < 1:
        raise ValueError(f"low={low} and high={high} must satisfy 0 < low < high < 1")
