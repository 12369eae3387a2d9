"""Weights of loss terms. A weight is a number, or a `LinearRamp` that changes from iteration to iteration."""

from dataclasses import dataclass

from cdm_lightning.kinds import Iteration, Iterations, Weight


@dataclass(frozen=True)
class LinearRamp:
    """A weight that is 0 before iteration `start`, rises linearly for `over` iterations and then stays at `value`.

    Iterations count from 0. The weight is value / over in iteration `start`, and reaches `value` in iteration
    start + over - 1. Raises ValueError for `over` below 1 or `start` below 0.
    """

    value: Weight
    over: Iterations
    start: Iteration = 0

    def __post_init__(self) -> None:
        if self.over < 1 or self.start < 0:
            raise ValueError(
                f"over={self.over} must be at least 1 iteration, and start={self.start} must be at least 0"
            )

    def at(self, iteration: int) -> float:
        """Return the weight in `iteration`, counted from 0."""
        return self.value * min(max((iteration + 1 - self.start) / self.over, 0.0), 1.0)


def weight_at(weight: float | LinearRamp, iteration: int) -> float:
    """Return the value of `weight` in `iteration`, counted from 0. A number has the same value in every iteration."""
    return weight.at(iteration) if isinstance(weight, LinearRamp) else float(weight)
