"""Health figures against closed forms, verdicts on made-up curves, and a run that is the same with and without the callback."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_callbacks import Recorder, fit

from cdm_lightning.callbacks.health import HealthMonitor
from cdm_lightning.core.flow import FunctionField
from cdm_lightning.metrics.colour import ColourStatistics, colour_figures
from cdm_lightning.training.health import against, compared, image_figures, score_figures, squares
from cdm_lightning.training.verdicts import RULES, WINDOW, Reading, findings, verdict

GOOD = {
    **dict.fromkeys(("brightness", "saturation", "contrast", "patch_grid", "x0_std", "diversity"), 1.0),
    **{"gap_fresh": 0.18, "cosine_fresh": 0.98, "magnitude_fresh": 1.0, "update_ratio": 1e-3, "skipped_steps": 0.0},
}


def readings(count: int = 8, **changed: float) -> list[Reading]:
    """Good readings every 10 iterations; from iteration 40 on, some figures are replaced."""
    return [Reading(10 * n, {**GOOD, **(changed if n >= 4 else {})}) for n in range(count)]


def test_gap_cosine_and_magnitude_are_those_of_a_turned_and_stretched_velocity() -> None:
    angle, stretch = 0.3, 1.5
    real = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).reshape(2, 2, 1, 1)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    fake = stretch * (real.flatten(1) @ turn.T).reshape_as(real)
    found = compared(real, fake)
    assert float(found["cosine"]) == pytest.approx(math.cos(angle), rel=1e-5)
    assert float(found["magnitude"]) == pytest.approx(stretch, rel=1e-5)
    assert float(found["gap"]) == pytest.approx(math.sqrt(1 + stretch**2 - 2 * stretch * math.cos(angle)), rel=1e-5)


def test_the_fake_score_s_error_is_measured_for_each_kind_of_samples() -> None:
    x0, noise = torch.full((4, 2, 1, 1), 3.0), torch.ones(4, 2, 1, 1)
    right = FunctionField(lambda x, sigma: torch.full_like(x, -2.0))  # noise - x0 of the fresh samples
    found = score_figures(right, right, {"fresh": x0, "replay": x0 + 1}, noise, torch.full((4,), 0.5))
    assert float(found["error_fresh"]) == pytest.approx(0)
    assert float(found["error_replay"]) == pytest.approx(1)
    assert float(found["gap_fresh"]) == float(found["gap_replay"]) == 0


def test_image_figures_are_those_of_the_metric_and_diversity_is_within_prompts() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x0 = torch.tensor([0.0, 2.0, 10.0, 12.0]).reshape(4, 1, 1, 1)  # two prompts: within each, 1 from the mean
    found = image_figures(x0, images, 2, ColourStatistics())
    for name, value in colour_figures(ColourStatistics()(images)).items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4)
    assert float(found["diversity"]) == pytest.approx(1)
    grey = against({**found, "saturation": torch.tensor(0.0)}, {**found, "saturation": torch.tensor(0.0)})
    assert float(grey["saturation"]) == 1
    ratios = against(found, found)
    assert {name: round(float(value), 6) for name, value in ratios.items()} == dict.fromkeys(ratios, 1.0) | {
        "x0_mean": 0
    }


def test_update_ratio_counts_change_and_weights() -> None:
    found = squares([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])])
    assert float(found["change"]) == 0.25
    assert float(found["weights"]) == 25


def test_good_readings_are_healthy_and_few_are_too_early() -> None:
    assert findings(readings()) == []
    assert verdict(readings(), []) == "healthy"
    assert verdict(readings(WINDOW - 1), []).startswith("too early")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
def test_each_fault_is_found_alone_on_its_side(rule) -> None:
    bad = rule.limit * (0.5 if rule.below else 2)
    (found,) = findings(readings(12, **{rule.figure: bad}))
    assert (found.kind, found.text, found.value) == (rule.kind, rule.text, pytest.approx(bad))
    assert found.since <= 40  # the first window that shows it holds the first bad reading, at iteration 40
    assert findings([*readings(12, **{rule.figure: bad}), *readings(4)]) == []  # it is over


def test_one_outlier_is_no_finding_but_a_value_that_is_not_finite_is() -> None:
    once = [*readings(), Reading(80, {**GOOD, "brightness": 0.7})]
    assert findings(once) == []
    (found,) = findings([Reading(10, {**GOOD, "gap_fresh": math.nan})])
    assert (found.kind, found.since) == ("not_finite", 10)
    (skipped,) = findings([Reading(10, {**GOOD, "skipped_steps": 2.0})])
    assert "gradients are not finite" in str(skipped)


def test_a_run_is_the_same_bit_for_bit_and_tells_its_health(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    alone, watched = Recorder(), Recorder()
    health = HealthMonitor(every=1, num_prompts=2, per_prompt=2, replay=1, teacher_steps=2)
    for name, callbacks in (("alone", [alone]), ("watched", [watched, health])):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        trainer, module = fit(tmp_path / name, callbacks)
    for before, after in zip(alone.students, watched.students, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    lines = [json.loads(line) for line in (tmp_path / "watched" / "health.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]  # the student moves in every second iteration
    assert "gap_replay" not in lines[0]["figures"]
    last = lines[-1]["figures"]
    assert {"gap_fresh", "gap_replay", "cosine_fresh", "diversity", "update_ratio", "velocity_rms"} <= set(last)
    assert 0 < last["update_ratio"] < 1
    mean = sum(line["figures"]["gap_fresh"] for line in lines) / 3
    assert float(trainer.callback_metrics["health/gap_fresh"]) == pytest.approx(mean, rel=1e-5)
    assert "health at the end: too early to tell (3 of 4 measurements)" in capsys.readouterr().err
    assert module.networks.student.training


def test_the_readings_survive_a_checkpoint_and_a_finding_can_stop_the_run(tmp_path: Path) -> None:
    first = HealthMonitor(every=1, num_prompts=1, per_prompt=2, teacher_steps=2)
    fit(tmp_path, [first], max_steps=4)
    resumed = HealthMonitor()
    resumed.load_state_dict(first.state_dict())
    assert resumed.state_dict() == first.state_dict()
    assert [reading.iteration for reading in resumed.readings] == [2, 4]
    stopping = HealthMonitor(every=1, num_prompts=1, per_prompt=2, teacher_steps=2, stop_on=("not_finite",))
    stopping.readings = [Reading(0, {"gap_fresh": math.nan})]
    trainer, _ = fit(tmp_path, [stopping], max_steps=6)
    assert trainer.global_step == 2
