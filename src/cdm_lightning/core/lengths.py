"""Distributions of the number of Euler steps of a rollout (the student's path from noise to an image).

CDM draws this number, K, anew in each iteration; it is the length of CDM's dynamic schedule (arXiv:2605.06376). To add
a distribution, write a class with `mean` and `sample`, as in `LengthDistribution`. All classes raise ValueError if
their arguments allow a K below 1 or do not describe a distribution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch

from cdm_lightning.kinds import NotEmpty, NotNegative, Positive, Steps


class LengthDistribution(Protocol):
    """The interface of a distribution of K, the number of steps of a rollout."""

    @property
    def mean(self) -> float:
        """The expected number of steps K."""

    def sample(self, rng: torch.Generator) -> int:
        """Draw the number of steps K, which is at least 1, with the generator `rng`."""


@dataclass(frozen=True)
class UniformLength:
    """A number of steps K that is uniform on the whole numbers low..high. CDM uses 1..28 (arXiv:2605.06376)."""

    low: Steps = 1
    high: Steps = 28

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        return (self.low + self.high) / 2

    def sample(self, rng: torch.Generator) -> int:
        """Draw the number of steps K from low..high with the generator `rng`."""
        return int(torch.randint(self.low, self.high + 1, (), generator=rng))


@dataclass(frozen=True)
class FixedLength:
    """A number of steps K that is always `length`."""

    length: Steps = 4

    def __post_init__(self) -> None:
        _check_range(self.length, self.length)

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        return float(self.length)

    def sample(self, rng: torch.Generator) -> int:
        """Return `length`. Nothing is drawn from `rng`."""
        return self.length


@dataclass(frozen=True)
class GeometricLength:
    """A number of steps K from 1..high with probability proportional to ratio^K.

    A `ratio` below 1 makes long rollouts rarer than short ones.
    """

    ratio: Positive = 0.85
    high: Steps = 28

    def __post_init__(self) -> None:
        _check_range(1, self.high)
        if not 0 < self.ratio < math.inf:
            raise ValueError(
                f"ratio={self.ratio} must be positive and finite: K steps have a probability proportional to ratio^K"
            )

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        return _mean(range(1, self.high + 1), [self.ratio**k for k in range(self.high)])

    def sample(self, rng: torch.Generator) -> int:
        """Draw the number of steps K from 1..high with the generator `rng`."""
        return 1 + _draw([self.ratio**k for k in range(self.high)], rng)


@dataclass(frozen=True)
class LogUniformLength:
    """A number of steps K from low..high with probability proportional to log((K + 1) / K).

    A K of 1 is as likely as a K in 2..3, and as likely as a K in 4..7, if these numbers lie in low..high.
    """

    low: Steps = 1
    high: Steps = 28

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        lengths = range(self.low, self.high + 1)
        return _mean(lengths, [math.log1p(1 / k) for k in lengths])

    def sample(self, rng: torch.Generator) -> int:
        """Draw the number of steps K from low..high with the generator `rng`."""
        return self.low + _draw([math.log1p(1 / k) for k in range(self.low, self.high + 1)], rng)


@dataclass(frozen=True)
class CategoricalLength:
    """A number of steps K that is one of `lengths`.

    The probabilities of the lengths are proportional to `weights`. If `weights` is None, all lengths are equally
    likely.
    """

    lengths: Annotated[Sequence[Steps], NotEmpty] = (1, 2, 4, 8, 16)
    weights: Sequence[NotNegative] | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={list(self.lengths)} must be one or more whole numbers of at least 1")
        weights = self._weights
        if len(weights) != len(self.lengths) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"weights={list(weights)} must hold one number of at least 0 for each of the {len(self.lengths)} lengths, and one "
                "of them must be above 0"
            )

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        return _mean(self.lengths, self._weights)

    def sample(self, rng: torch.Generator) -> int:
        """Draw the number of steps K from `lengths` with the generator `rng`."""
        return int(self.lengths[_draw(self._weights, rng)])

    @property
    def _weights(self) -> Sequence[float]:
        return [1.0] * len(self.lengths) if self.weights is None else self.weights


def _check_range(low: int, high: int) -> None:
    if not 1 <= low <= high:
        raise ValueError(f"low={low} and high={high} must satisfy 1 <= low <= high (numbers of steps of a rollout)")


def _mean(lengths: Sequence[int], weights: Sequence[float]) -> float:
    return sum(k * weight for k, weight in zip(lengths, weights)) / sum(weights)


def _draw(weights: Sequence[float], rng: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=rng))
