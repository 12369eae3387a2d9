"""An objective's own state in a checkpoint: what is refused at the start, and whose state is given back."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from cdm_lightning.checkpoint.objective_state import class_of, require_readable, restore_objective
from cdm_lightning.errors import UserError
from cdm_lightning.objectives.base import Objective, Update


class Counting(Objective):
    """Keeps whatever it is given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state, self.loaded = state, 0

    def updates(self, iteration: int) -> list[Update]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state) -> None:
        self.state, self.loaded = dict(state), self.loaded + 1


class Other(Counting):
    """Another class with a state."""


def test_plain_values_and_tensors_can_be_kept():
    require_readable(Counting({"a": 1, "b": [0.5, None], "c": {"d": torch.ones(2)}, "e": "text"}))


@pytest.mark.parametrize("value", [np.float64(1.0), deque([1]), object(), lambda: 1])
def test_what_could_not_be_read_back_is_refused(value):
    with pytest.raises(UserError, match=r"the state_dict of .*Counting cannot be read back") as refused:
        require_readable(Counting({"a": value}))
    assert "\n" not in str(refused.value)


def test_a_state_goes_back_to_its_class_alone():
    kept = {"objective": {"a": 1}, "objective_class": class_of(Counting({}))}
    own, other = Counting({}), Other({})
    assert restore_objective(own, kept) is None
    assert own.state == {"a": 1}
    assert "is ignored by" in restore_objective(other, kept)
    assert other.state == {}
    for without in ({}, {"objective": {}, "objective_class": "any"}):  # of a version, or an objective, without one
        assert restore_objective(own, without) is None
    assert (own.loaded, other.loaded) == (1, 0)
