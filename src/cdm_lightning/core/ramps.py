"""Weights of loss terms: constants, or functions of the iteration."""

from dataclasses import dataclass

from cdm_lightning.kinds import Iteration, Iterations, Weight


@dataclass(frozen=True)
class LinearRamp:
    """A weight that is 0 before iteration `start`, then rises linearly for `over` iterations, and then stays at `value`.

    Iterations count from 0; the weight is value / over at `start` and `value` from iteration start + over - 1 on. Raises
    ValueError unless over >= 1 and start >= 0.
    """

    value: Weight
    over: Iterations
    start: Iteration = 0

    def __post_init__(self) -> None:
        if self.over < 1 or self.start < 0:
            raise ValueError(
                f"over={self.over} must be at least 1 and start={self.start} at least 0 (iterations of a ramp)"
            )

    def at(self, iteration: int) -> float:
        """Return the weight at this iteration, counted from 0."""
        return self.value * min(max((iteration + 1 - self.start) / self.over, 0.0), 1.0)


def weight_at(weight: float | LinearRamp, iteration: int) -> float:
    """Return a constant weight or the value of a ramp at this iteration, counted from 0."""
    return weight.at(iteration) if isinstance(weight, LinearRamp) else float(weight)
