"""Warnings before training, metrics with unusual answers, and a locale without UTF-8."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cdm_lightning.backbones.flux import FluxBackbone
from cdm_lightning.checkpoint.best import Best
from cdm_lightning.errors import UserError
from cdm_lightning.metrics.base import Metric
from cdm_lightning.metrics.suite import Collected, MetricSuite


class Answer(Metric):
    """A metric that answers what it is told to."""

    def __init__(self, scores=(None,), figures=None, facts=None) -> None:
        self.answers, self.found, self.known = list(scores), figures, facts or {}

    def score(self, batch):
        return self.answers.pop(0)

    def figures(self, measured, others):
        return super().figures(measured, others) if self.found is None else self.found

    def facts(self):
        return self.known


def measured(metric: Metric, batches: int = 1) -> tuple[MetricSuite, Collected]:
    suite, collected = MetricSuite({"m": metric}), Collected()
    for number in range(batches):
        suite.measure(collected, torch.zeros(2, 3, 4, 4), ["a", "b"], [2 * number, 2 * number + 1])
    return suite, collected


def test_scores_in_a_column_are_one_score_for_each_image() -> None:
    suite, collected = measured(Answer([torch.tensor([[1.0], [3.0]])]))
    assert suite.figures({"s": collected})["s"] == {"m": 2.0}
    assert [row["m"] for row in suite.scores({"s": collected})] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([torch.zeros(3)], "one score for each"),
        ([torch.zeros(2, 2)], "one score for each"),
        ([torch.zeros(2), None], "None for others"),
        ([None, torch.zeros(2)], "None for others"),
    ],
)
def test_scores_that_are_not_one_for_each_image_are_refused(scores, told) -> None:
    with pytest.raises(UserError, match=rf"metric\.m: .*{told}"):
        measured(Answer(scores), len(scores))


def test_a_figure_that_is_none_is_left_out_and_facts_can_always_be_written() -> None:
    suite, collected = measured(Answer(figures={"mean": 1, "max": None}, facts={"folder": Path("x"), "n": 3}))
    assert suite.figures({"s": collected})["s"] == {"m_mean": 1.0}
    assert json.loads(json.dumps(suite.facts())) == {"m_folder": "x", "m_n": 3}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_never_best(value, tmp_path) -> None:
    assert not Best(tmp_path, "val/m/s").is_improved_by(value)
    assert Best(tmp_path, "val/m/s").is_improved_by(1.0)


@pytest.mark.parametrize(
    ("has_input", "told", "scale", "warning"),
    [
        (True, 3.5, 7.0, "objective.guidance_scale=7.0 is added to"),
        (True, 1.0, 7.0, None),
        (True, 3.5, 0.0, None),
        (False, 3.5, 7.0, "already distilled to few steps"),
    ],
)
def test_one_warning_for_a_teacher_that_is_distilled_already(has_input, told, scale, warning) -> None:
    teacher = SimpleNamespace(is_told_guidance=has_input, guidance_embed=told)
    cautions = FluxBackbone.cautions(teacher, scale)
    assert len(cautions) == (warning is not None)
    assert warning is None or warning in cautions[0]


def test_a_locale_without_utf8_writes_and_prints_names_as_they_are(tmp_path) -> None:
    program = (
        "from cdm_lightning.terminal.quiet import quiet_libraries; quiet_libraries(); import sys; from pathlib import Path\n"
        "name = sys.argv[1]; Path(name).write_text(name + ' é', encoding='utf-8'); print(name, 'é')"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py", "выход"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.stderr.decode() == ""
    assert done.stdout.decode() == "выход é\n"
    assert (tmp_path / "выход").read_text(encoding="utf-8") == "выход é"
