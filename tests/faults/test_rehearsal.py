"""What comes at the end of a run is rehearsed before its first step: the export, and what metrics measure."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cdm_lightning.backbones import plain_scheduler, student_folder
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.callbacks.ladder import LadderReport
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.ladder import LadderEvaluation
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.exporting import pipeline
from cdm_lightning.exporting.pipeline import export_pipeline, rehearse_export
from cdm_lightning.metrics.base import Metric
from cdm_lightning.metrics.frechet import FeatureStatistics, Frechet
from cdm_lightning.metrics.rehearsal import rehearse
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.run.folder import Run

SIZES, PROMPTS, CPU = [(32, 32)], ["a", "b"], torch.device("cpu")


@pytest.fixture
def backbone(tiny_pipeline_folder) -> SD3Backbone:
    return SD3Backbone(str(tiny_pipeline_folder))


def small_files(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".md")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


def test_the_rehearsal_writes_the_small_files_of_an_export_and_leaves_nothing(backbone, tmp_path, monkeypatch):
    seen, original = {}, student_folder.rehearse_pipeline

    def watched(source, folder, *arguments):
        original(source, folder, *arguments)
        seen.update(small_files(folder))

    monkeypatch.setattr("cdm_lightning.backbones.diffusers_pipeline.rehearse_pipeline", watched)
    rehearse_export(backbone, tmp_path / "student", 4, Run(tmp_path))
    assert list(tmp_path.iterdir()) == []
    export_pipeline(backbone, backbone.build_network(), tmp_path / "student", 4, "student", 0, run=Run(tmp_path))
    written = small_files(tmp_path / "student")
    assert {"README.md", "call.json", "model_index.json", "scheduler/scheduler_config.json"} == seen.keys()
    assert seen == {name: written[name] for name in seen}


def test_what_would_fail_in_the_export_fails_before_training(backbone, tmp_path, monkeypatch):
    class Trainer:
        is_global_zero, default_root_dir = True, str(tmp_path)

    class Module:
        def __init__(self, backbone):
            self.backbone = backbone

    evaluation = LadderEvaluation(PROMPTS, samplers=[SamplerSpec("student", nfe=1)])
    report = LadderReport(evaluation, MetricSuite())
    report.setup(Trainer(), Module(backbone), "fit")
    monkeypatch.setattr(plain_scheduler, "TOLERANCE", -1.0)  # as with another release of diffusers
    with pytest.raises(UserError, match="the installed diffusers computes sigmas that differ"):
        report.setup(Trainer(), Module(backbone), "fit")
    monkeypatch.undo()
    monkeypatch.setattr(student_folder.os, "access", lambda path, mode: "text_encoder_2" not in str(path))
    with pytest.raises(UserError, match=r"text_encoder_2/.*the export at the end of the run cannot read this file"):
        report.setup(Trainer(), Module(backbone), "fit")
    monkeypatch.undo()
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics.json"):
        report.setup(Trainer(), Module(backbone), "fit")


def test_a_full_disk_is_no_error_of_the_rehearsal(backbone, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "model_card", full)
    rehearse_export(backbone, tmp_path / "student", 4, Run(tmp_path))


# ---- metrics


class Wide(nn.Module):
    """Features of images of 32 x 32 pixels and of no others; as an extractor of the user."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 5)

    def forward(self, images):
        return self.layer(images.flatten(1))


class Own(Metric):
    """A metric of the user with a mistake in it."""

    def score(self, batch):
        raise KeyError("mistake")


STATISTICS = FeatureStatistics(torch.zeros(7), torch.eye(7), 10)


def test_statistics_of_another_extractor_are_refused_before_training():
    suite = MetricSuite({"fd": Frechet(STATISTICS, "wide")}, {"wide": Wide()})
    with pytest.raises(
        UserError, match=r"metric.fd cannot measure images of 32 x 32 pixels: .* 7 features, but feature.wide gives 5"
    ):
        rehearse(suite, SIZES, PROMPTS, CPU)
    fitting = FeatureStatistics(torch.zeros(5), torch.eye(5), 10)
    rehearse(MetricSuite({"fd": Frechet(fitting, "wide")}, {"wide": Wide()}), SIZES, PROMPTS, CPU)


def test_an_extractor_that_cannot_read_a_size_fails_before_training():
    suite = MetricSuite({"fd": Frechet(iter(()), "wide")}, {"wide": Wide()})
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # the user's class: its traceback is wanted
        rehearse(suite, [(32, 32), (16, 32)], PROMPTS, CPU)

    class Ours(Wide):
        __module__ = "cdm_lightning.metrics.extractors"

    suite = MetricSuite({"fd": Frechet(iter(()), "wide")}, {"wide": Ours()})
    with pytest.raises(UserError, match=r"feature.wide cannot read images of 32 x 16 pixels: .*mat1 and mat2"):
        rehearse(suite, [(32, 32), (16, 32)], PROMPTS, CPU)


def test_a_metric_of_the_user_fails_before_the_first_step_of_a_run(tmp_path, toy_run, monkeypatch):
    steps = []
    monkeypatch.setattr("cdm_lightning.module.CDMModule.training_step", lambda *_: steps.append(1))

    with pytest.raises(KeyError, match="mistake"):
        toy_run(f"+metric.mine._target_={__name__}.Own", "callbacks=metrics", "trainer.limit_val_batches=1")
    assert not steps


def test_references_are_not_read_in_the_rehearsal():
    class References:
        def __iter__(self):
            pytest.fail("reference images were read before training")

    rehearse(MetricSuite({"fd": Frechet(References(), "wide")}, {"wide": Wide()}), SIZES, PROMPTS, CPU)
