"""The examples of docs/new-metric.md and docs/new-backbone.md, run as they stand there."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from cdm_lightning.config import build, compose
from cdm_lightning.train import TrainResult, train

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`example("new-metric.md", "sharpness", "metric")` writes the page's Python and YAML, and gives the search path."""

    def write(page: str, name: str, group: str) -> str:
        text = (DOCS / page).read_text(encoding="utf-8")
        code, options = (re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1] for language in ("python", "yaml"))
        (tmp_path / f"{name}.py").write_text(code)
        folder = tmp_path / "conf" / group
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(options)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"hydra.searchpath=[file://{tmp_path}/conf]"

    return write


def test_a_metric_from_outside_is_in_validation_and_in_the_ladder(example, prompt_file, tmp_path) -> None:
    search = example("new-metric.md", "sharpness", "metric")
    small = ("backbone.hidden=16", "backbone.depth=1", "backbone.fit_steps=20", "trainer.max_steps=2")
    data = (f"data.train.path={prompt_file}", f"data.val.path={prompt_file}", "data.val_prompts=6", "data.batch_size=4")
    chosen = ("experiment=toy2d_cdm", "data=prompts", "callbacks=ladder", "metric=[energy_distance,sharpness]")
    run = (
        "trainer.val_check_interval=2",
        f"output_dir={tmp_path / 'run'}",
        "callbacks.ladder.evaluation.samplers=[%s]",
    )
    samplers = "{_target_: cdm_lightning.evaluation.samplers.SamplerSpec, name: student 1 step, nfe: 1}"
    result: TrainResult = train(compose([search, *chosen, *small, *data, *run[:2], run[2] % samplers]))

    logged = result.metrics["val/sharpness/student_1"]
    rows = json.loads((result.folder / "metrics.json").read_text())["rows"]
    assert [row["sampler"] for row in rows] == ["student 1 step"]
    assert rows[0]["sharpness"] == pytest.approx(logged, rel=1e-5)  # the same prompts and noise
    assert 0 < rows[0]["sharpness"] < 100  # scale 100, of the YAML
    assert "energy_distance" in rows[0]
    assert "| sampler | energy distance | sharpness |" in (result.folder / "table.md").read_text()
    with (result.folder / "scores.csv").open(newline="") as file:
        scores = [float(row["sharpness"]) for row in csv.DictReader(file)]
    assert len(scores) == 6
    assert sum(scores) / 6 == pytest.approx(rows[0]["sharpness"], rel=1e-5)
    with (result.folder / "scores/iteration_0000002.csv").open(newline="") as file:
        validated = [float(row["sharpness"]) for row in csv.DictReader(file) if row["sampler"] == "student_1"]
    assert validated == pytest.approx(scores, rel=1e-5)


def test_a_backbone_from_outside_trains(example, tiny_pipeline_folder, prompt_file, tmp_path) -> None:
    search = example("new-backbone.md", "clean_sd3", "backbone")
    options = ("experiment=sd3_cdm", "backbone=clean_sd3", f"backbone.pretrained={tiny_pipeline_folder}")
    options += ("backbone.teacher_dtype=float32", "backbone.text_dtype=float32", "module.compute_dtype=float32")
    options += (
        f"data.train.path={prompt_file}",
        f"data.val.path={prompt_file}",
        "data.batch_size=2",
        "data.num_workers=0",
    )
    options += ("callbacks=none", "trainer.max_steps=2", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1")
    config = compose(
        [search, *options, "backbone.max_sequence_length=8", "schedule.length.high=2", f"output_dir={tmp_path / 'run'}"]
    )
    result = train(config)
    assert result.iteration == 2
    assert result.metrics["student/loss"] > 0

    backbone = build(config, "backbone")
    backbone.setup(torch.device("cpu"))
    network, cond = backbone.build_network(), backbone.encode_prompts(["a ring"])
    x, sigma = torch.randn(1, *backbone.latent_shape), torch.tensor([0.5])
    with torch.no_grad():
        output = super(type(backbone), backbone).velocity(network, x, sigma, cond)
        torch.testing.assert_close(backbone.velocity(network, x, sigma, cond), (x - output) / 0.5)
