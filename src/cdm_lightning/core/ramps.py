"""Weights that change with the iteration, as a function of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRamp:
    """Zero before iteration `start`; from there on up in `over` equal steps of value / over, then `value`."""

    value: float
    over: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.over < 1 or self.start < 0:
            raise ValueError(f"a ramp needs over >= 1 and start >= 0, got {self.over} and {self.start}")

    def at(self, iteration: int) -> float:
        """The weight at this iteration, counted from 0."""
        return self.value * min(max((iteration + 1 - self.start) / self.over, 0.0), 1.0)


def weight_at(weight: float | LinearRamp, iteration: int) -> float:
    """The weight at this iteration, counted from 0."""
    return weight.at(iteration) if isinstance(weight, LinearRamp) else float(weight)
