"""The network calls of each objective, counted, are those that docs/objectives.md states."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cdm_lightning.config import build, compose
from cdm_lightning.core.flow import VelocityField
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.objectives.base import RolledOutSample, VelocityFields
from cdm_lightning.objectives.dmd2 import RealHead

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
ROWS = {
    name: cells
    for name, *cells in re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.M
    )
}
SHAPE, BATCH = (2, 2, 2), 3


class Counting(VelocityField):
    """A field with one weight that writes down, for each call, whether gradients are recorded."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.scale = torch.ones((), requires_grad=True)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append("+" if torch.is_grad_enabled() else "")
        return self.scale * 0.3 * x

    def given(self, **inputs: Tensor) -> VelocityField:
        return self

    def with_features(self, x: Tensor, sigma: Tensor, blocks) -> tuple[Tensor, list[Tensor]]:
        return self(x, sigma), [self.scale * x.flatten(2).transpose(1, 2) for _ in blocks]

    def counted(self) -> str:
        """The calls so far, as the page writes them; they are forgotten."""
        counts = [f"{self.calls.count(mark)}{mark}" for mark in ("", "+") if mark in self.calls]
        self.calls.clear()
        return ", ".join(counts) or "0"


@pytest.mark.parametrize("name", ROWS)
def test_the_calls_are_those_of_the_page(name) -> None:
    objective = build(compose([f"objective={name}", "backbone=toy2d"]), "objective")
    student, teacher, fake_score = Counting(), Counting(), Counting()
    fields = VelocityFields(student, teacher, teacher, {"fake_score": fake_score}, {"head": RealHead(2, 1)})
    rng = StepRandom(0, 0, range(BATCH), "cpu")
    x = rng.normal("x", SHAPE)
    point = TrajectoryPoint(x, 0.3 * x, torch.full((BATCH,), 0.8), torch.full((BATCH,), 0.4))
    sample = RolledOutSample(
        ["a"] * BATCH, fields, rng, torch.clone, torch.clone, SHAPE, 10**6, x, point=point, steps=4
    )
    updates = {update.role: update for turn in objective.typical_cycle() for update in turn}

    def counted(role: str, *networks: Counting) -> list[str]:
        if role not in updates:
            return ["-" for _ in networks]
        list(updates[role].losses(sample))
        found = [network.counted() for network in networks]
        for network in (student, teacher, fake_score):
            network.calls.clear()
        return found

    of_student = counted("student", student, teacher, fake_score)
    if "fake_score" not in updates:
        of_student[2] = "-"
    assert [*of_student, *counted("fake_score", student, fake_score)] == [cell.strip() for cell in ROWS[name]]
    if "head" in updates:
        assert counted("head", fake_score) == ["2"]


def test_the_page_has_the_cost_of_every_objective() -> None:
    named = {path.stem for path in (ROOT / "conf/objective").glob("*.yaml")}
    assert named - set(ROWS) == {"cdm_ramp", "dm_cdm"}  # which cost what cdm and its terms cost
