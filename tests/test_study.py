"""The study of objectives: its plan is complete and composes, tuning chooses by the rule, and the report has all runs."""

import json
import math

import pytest
import yaml

from benchmarks.study import PLAN, Cell, Study, spread_in_modes
from benchmarks.study_report import interval, mean_rows, plot, ratio_rows, text_of
from cdm_lightning.backbones.toy2d import exact_points
from cdm_lightning.config import compose

PLANNED = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
PLANS = [PLANNED, yaml.safe_load(PLAN.with_name("study_plan_2.yaml").read_text(encoding="utf-8"))]
TASKS = [(plan, task) for plan in PLANS for task in plan["tasks"]]


def figures(value: float, metric: str = "energy_distance") -> dict:
    return {str(nfe): {metric: value} for nfe in PLANNED["steps"]}


def keep(study: Study, cell: Cell, value: float) -> None:
    result = {**cell.__dict__, "seconds": 1.0, "figures": figures(value)}
    (study.folder / f"{cell.name}.json").write_text(json.dumps(result))


@pytest.mark.parametrize(("plan", "task"), TASKS, ids=[f"{plan['name']}-{task}" for plan, task in TASKS])
def test_every_arm_composes_with_its_own_rates_and_length(plan, task, tmp_path) -> None:
    study = Study(plan, task, tmp_path)
    for arm in study.task["arms"]:
        config = compose(study.overrides(Cell(task, arm, 2.0, 3, "long")))
        assert config.trainer.max_steps == 4 * study.task["iterations"]
        assert config.optim.student.learning_rate.peak == 2 * study.task["rates"]["student"]
        assert config.seed == 3


def test_the_factor_is_chosen_on_the_tuning_seeds_and_used_for_all_others(tmp_path) -> None:
    study = Study(PLANNED, "toy2d", tmp_path)
    first = next(study.missing(["once"]))
    assert first.seed in PLANNED["tuning_seeds"]
    assert not set(PLANNED["tuning_seeds"]) & set(PLANNED["seeds"])
    assert study.rate("cdm") is None
    for arm in study.task["arms"]:
        for cell in study.tries(arm):
            keep(study, cell, {0.5: 3.0, 1.0: 1.0, 2.0: 2.0}[cell.rate])
    assert study.rate("cdm") == 1.0
    missing = list(study.missing(["once", "long"]))
    assert {cell.rate for cell in missing} == {1.0}
    assert [cell.seed for cell in missing[: len(study.task["arms"])]] == [1] * len(study.task["arms"])
    assert len(missing) == 2 * 5 * len(study.task["arms"])


def test_the_report_has_means_and_intervals_over_seeds_and_compares_runs_of_one_seed(tmp_path) -> None:
    study = Study(PLANNED, "toy2d", tmp_path)
    for arm in study.task["arms"]:
        for cell in study.tries(arm):
            keep(study, cell, cell.rate)
    for arm, factor in (("cdm", 1), ("random", 0.5)):
        for cell in study.cells(arm, "once"):
            keep(study, cell, factor * cell.seed)
    keep(study, study.cells("cdm", "long")[2], 12.0)
    row, _ = mean_rows(study, "once", "energy_distance")
    assert row["runs"] == 5
    assert row["rate"] == 0.5
    assert row["4 steps"].startswith("3 (")
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert low == pytest.approx(3 - 1.96 * math.sqrt(2 / 5), abs=0.15)
    assert high == pytest.approx(3 + 1.96 * math.sqrt(2 / 5), abs=0.15)
    _, random = ratio_rows(study, "once", "cdm")
    assert random == {"arm": "random", "pairs": 5} | {f"{nfe} steps": "0.50 (0.50 to 0.50)" for nfe in PLANNED["steps"]}
    (longer,) = ratio_rows(study, "long", other="once")
    assert longer["pairs"] == 1
    assert longer["8 steps"].startswith("4.00")
    text = text_of(study, study.results("cdm", "once") + study.results("cdm", "long"), {"cdm": 7.5})
    assert "4 times the iterations against once" in text
    assert "| cdm | 7.5 |" in text
    assert plot(study, PLANNED["budgets"]).startswith(b"\x89PNG")


def test_the_spread_within_modes_is_one_for_the_data_and_scales_with_it():
    points = exact_points(["anywhere"] * 20_000, 5)
    assert spread_in_modes(points) == {"radial": pytest.approx(1, rel=0.02), "tangential": pytest.approx(1, rel=0.02)}
    assert spread_in_modes(1.2 * points)["radial"] == pytest.approx(math.hypot(0.2 * 1.5 / 0.15, 1.2), rel=0.02)
