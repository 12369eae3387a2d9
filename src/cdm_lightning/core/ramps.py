"""Weights of loss terms that are functions of the iteration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRamp:
    """A weight that is 0 before iteration `start` and rises in `over` equal steps, from value / over at `start` to `value`."""

    value: float
    over: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.over < 1 or self.start < 0:
            raise ValueError(f"a ramp needs over >= 1 and start >= 0, got {self.over} and {self.start}")

    def at(self, iteration: int) -> float:
        """Return the weight at this iteration, counted from 0."""
        return self.value * min(max((iteration + 1 - self.start) / self.over, 0.0), 1.0)


def weight_at(weight: float | LinearRamp, iteration: int) -> float:
    """Return the weight at this iteration, counted from 0."""
    return weight.at(iteration) if isinstance(weight, LinearRamp) else float(weight)
