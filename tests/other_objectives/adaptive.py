"""CDM in which the student waits until the fake score has caught up with it: a ratio of updates that follows a measurement."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cdm_lightning.objectives.base import Update
from cdm_lightning.objectives.cdm import CDMObjective


@dataclass
class Lag:
    """Where the fake score stands: two running means of its loss, and the iterations since the student's last update."""

    fast: float | None = None
    slow: float | None = None
    waited: int = 0

    def note(self, loss: float, fast_decay: float, slow_decay: float) -> None:
        """Take in one loss."""
        first = self.fast is None or self.slow is None
        self.fast = loss if first else fast_decay * self.fast + (1 - fast_decay) * loss
        self.slow = loss if first else slow_decay * self.slow + (1 - slow_decay) * loss


@dataclass(frozen=True)
class AdaptiveObjective(CDMObjective):
    """CDM whose student is updated as soon as the fake score's loss is back at its usual height.

    After an update of the student the fake score lags behind, and the mean of its last losses (`fast_decay`) rises above the
    one of many (`slow_decay`). The student's turn comes in an iteration where the former is at most `tolerance` times the
    latter, at the latest after `longest` iterations. `typical` is how many that are on average, for the planner alone;
    CDM's `student_every` has no meaning here.
    """

    tolerance: float = 1.0
    fast_decay: float = 0.5
    slow_decay: float = 0.9
    longest: int = 4
    typical: int = 2
    lag: Lag = field(default_factory=Lag, init=False, compare=False)

    @property
    def student_period(self) -> None:
        """Not known in advance: each iteration rolls out alone."""
        return None

    def updates(self, iteration: int) -> list[Update]:
        """The fake score, and the student if it is its turn by what was measured before this iteration."""
        return self._updates(self._is_due())

    def typical_cycle(self) -> list[list[Update]]:
        """`typical` iterations, the last of them with the student."""
        return [self._updates(with_student=turn == self.typical - 1) for turn in range(self.typical)]

    def observe(self, role: str, figures: Mapping[str, Tensor], made: bool) -> None:
        """Follow the fake score's loss; the student's update begins a new wait."""
        if role == "student":
            self.lag.waited = 0
            return
        if made:
            self.lag.note(float(figures["loss"]), self.fast_decay, self.slow_decay)
        self.lag.waited += 1

    def state_dict(self) -> dict[str, Any]:
        """The measurements."""
        return dict(vars(self.lag))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from them; a checkpoint of another objective has none."""
        vars(self.lag).update(state)

    def _is_due(self) -> bool:
        if self.lag.waited + 1 >= self.longest:
            return True
        return self.lag.fast is not None and self.lag.fast <= self.tolerance * self.lag.slow

    def _updates(self, with_student: bool) -> list[Update]:
        fake_score, student = super().updates(self.student_every - 1)  # CDM's iteration with both
        return [fake_score, student] if with_student else [fake_score]
