"""The golden curves hold: see `golden_curves.py` for what they are and how they are written anew."""

import copy
import math

import golden_curves
import pytest


@pytest.mark.parametrize("name", golden_curves.CURVES)
def test_the_curve_is_the_golden_one(name):
    differs = golden_curves.difference(golden_curves.stored(name), golden_curves.measure(name))
    assert differs is None, (
        f"{name}: {differs}. A commit that is not meant to change arithmetic must not do this; one that is runs "
        f"`{golden_curves.COMMAND} {name}` and says in its message why, with the difference."
    )


def test_the_smallest_change_is_seen():
    golden = golden_curves.stored("toy2d_full")
    assert len(golden["losses"]) == golden_curves.ITERATIONS
    assert golden_curves.difference(golden, golden) is None
    expected = {
        changed_loss: "iteration 8, student/loss (bit for bit)",
        changed_checksum: "weights of student (bit for bit)",
        without_an_iteration: "19 iterations, golden 20",
        without_a_network: "networks ['fake_score', 'student'], golden",
    }
    for change, message in expected.items():
        assert message in golden_curves.difference(golden, change(copy.deepcopy(golden)))


def test_on_another_processor_rounding_is_allowed_and_more_is_not():
    golden = golden_curves.stored("toy2d_full")
    other = changed_checksum(changed_loss(copy.deepcopy(golden)))
    other["facts"]["processor"] = "another one"
    assert golden_curves.difference(golden, other) is None
    other["losses"][3]["fake_score/loss"] *= 1.02
    assert "iteration 4, fake_score/loss" in golden_curves.difference(golden, other)


def changed_loss(curve: dict) -> dict:
    losses = curve["losses"][7]
    losses["student/loss"] = math.nextafter(losses["student/loss"], math.inf)
    return curve


def changed_checksum(curve: dict) -> dict:
    curve["checksums"]["student"] = "0" * 64
    return curve


def without_an_iteration(curve: dict) -> dict:
    curve["losses"] = curve["losses"][:-1]
    return curve


def without_a_network(curve: dict) -> dict:
    del curve["sums"]["student_ema"]
    return curve
