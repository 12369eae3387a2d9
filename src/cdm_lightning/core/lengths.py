"""Distributions of K, the number of Euler steps of a rollout (the student's path from noise to an image).

CDM draws K anew in each iteration (arXiv:2605.06376, the length of its dynamic schedule). To add a distribution, write a class
with `sample` and `mean`. All classes here raise ValueError for arguments that do not define a distribution over K >= 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch

from cdm_lightning.kinds import NotEmpty, NotNegative, Positive, Steps


class LengthDistribution(Protocol):
    """The interface of a distribution of the number of steps."""

    @property
    def mean(self) -> float:
        """The expected number of steps K."""

    def sample(self, rng: torch.Generator) -> int:
        """Draw one K >= 1 with the generator `rng`."""


@dataclass(frozen=True)
class UniformLength:
    """The number of steps K is uniform on low..high, both included; 1..28 is the choice of CDM (arXiv:2605.06376)."""

    low: Steps = 1
    high: Steps = 28

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        return (self.low + self.high) / 2

    def sample(self, rng: torch.Generator) -> int:
        """Draw one K of low..high."""
        return int(torch.randint(self.low, self.high + 1, (), generator=rng))


@dataclass(frozen=True)
class FixedLength:
    """The number of steps K is always `length`."""

    length: Steps = 4

    def __post_init__(self) -> None:
        _check_range(self.length, self.length)

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        return float(self.length)

    def sample(self, rng: torch.Generator) -> int:
        """Return `length`."""
        return self.length


@dataclass(frozen=True)
class GeometricLength:
    """The probability of K steps is proportional to ratio^K on 1..high: with a ratio below 1, long rollouts are rarer."""

    ratio: Positive = 0.85
    high: Steps = 28

    def __post_init__(self) -> None:
        _check_range(1, self.high)
        if not 0 < self.ratio < math.inf:
            raise ValueError(
                f"ratio={self.ratio} must be a positive, finite number: P(length K) is proportional to ratio^K"
            )

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        return _mean(range(1, self.high + 1), [self.ratio**k for k in range(self.high)])

    def sample(self, rng: torch.Generator) -> int:
        """Draw one K of 1..high."""
        return 1 + _draw([self.ratio**k for k in range(self.high)], rng)


@dataclass(frozen=True)
class LogUniformLength:
    """The probability of K steps is proportional to log((K + 1) / K) on low..high: each doubling of K is about equally likely."""

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
        """Draw one K of low..high."""
        return self.low + _draw([math.log1p(1 / k) for k in range(self.low, self.high + 1)], rng)


@dataclass(frozen=True)
class CategoricalLength:
    """The number of steps K is one of `lengths`, with probabilities proportional to `weights` (None: equal probabilities)."""

    lengths: Annotated[Sequence[Steps], NotEmpty] = (1, 2, 4, 8, 16)
    weights: Sequence[NotNegative] | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={list(self.lengths)} must be one or more whole numbers of at least 1")
        weights = self._weights
        if len(weights) != len(self.lengths) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"weights={list(weights)} must be one number of at least 0 for each of the {len(self.lengths)} lengths, not all 0"
            )

    @property
    def mean(self) -> float:
        """The expected number of steps K."""
        return _mean(self.lengths, self._weights)

    def sample(self, rng: torch.Generator) -> int:
        """Draw one of the lengths."""
        return int(self.lengths[_draw(self._weights, rng)])

    @property
    def _weights(self) -> Sequence[float]:
        return [1.0] * len(self.lengths) if self.weights is None else self.weights


def _check_range(low: int, high: int) -> None:
    if not 1 <= low <= high:
        raise ValueError(
            f"the length of a rollout is at least 1 step, and low is at most high; got {low} to {high} steps"
        )


def _mean(lengths: Sequence[int], weights: Sequence[float]) -> float:
    return sum(k * weight for k, weight in zip(lengths, weights)) / sum(weights)


def _draw(weights: Sequence[float], rng: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=rng))
