"""Callbacks driven by real short runs; what they log is compared with the images and weights of those runs."""

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from clip_folder import write_clip_folder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.callbacks.ladder import LadderReport
from cdm_lightning.callbacks.loggers import GuardedLogger
from cdm_lightning.callbacks.metrics import ValidationMetrics
from cdm_lightning.callbacks.progress import TrainingProgress
from cdm_lightning.callbacks.sample_grid import SampleGrid
from cdm_lightning.callbacks.throughput import ThroughputMonitor
from cdm_lightning.core.lengths import UniformLength
from cdm_lightning.core.schedules import RandomSchedule
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.prompts import PromptFile
from cdm_lightning.data.shapes import draw_scenes
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.ladder import LadderEvaluation
from cdm_lightning.evaluation.pictures import picture
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.metrics.adherence import Adherence
from cdm_lightning.metrics.base import ImageBatch, Metric
from cdm_lightning.metrics.clip_score import CLIPScore
from cdm_lightning.metrics.diversity import Diversity
from cdm_lightning.metrics.extractors import OpenClipFeatures
from cdm_lightning.metrics.frechet import FeatureStatistics, Frechet, FrechetToSampler, frechet_distance
from cdm_lightning.metrics.references import ShapesRenderings, render_prompts
from cdm_lightning.metrics.shapes_classifier import ShapesClassifier
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.training.ema import EMA
from cdm_lightning.training.optim import LearningRate, OptimizerRecipe

SAMPLERS = (SamplerSpec("student_2", "student", 2), SamplerSpec("teacher_1", "teacher", 1))
TRAIN_BATCH, VAL_PROMPTS = 4, 5


class Recorder(L.Callback):
    """Keeps what the run produced: validation outputs by run of validation, student weights by iteration."""

    def __init__(self) -> None:
        self.validations: list[list[dict]] = []
        self.students: list[dict[str, Tensor]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validations.append([])

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict, *_: object
    ) -> None:
        self.validations[-1].append(outputs)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.students.append(weights_of(pl_module.networks.student))

    def images(self, sampler: str, validation: int = -1) -> Tensor:
        return torch.cat([outputs["images"][sampler] for outputs in self.validations[validation]])


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def recipe(rate: float) -> OptimizerRecipe:
    return OptimizerRecipe(partial(torch.optim.AdamW), LearningRate(rate, warmup=1))


def fit(
    folder: Path,
    callbacks: Sequence[L.Callback],
    backbone: Backbone | None = None,
    max_steps: int = 6,
    ema: EMA | None = None,
    **settings: object,
) -> tuple[L.Trainer, CDMModule]:
    """A run of `max_steps` iterations with a validation of 5 prompts, in batches of 2, after each third."""
    prompts = folder / "prompts.txt"
    captions = dict.fromkeys(scene.caption for scene in draw_scenes(40, 0))
    prompts.write_text("\n".join(captions), encoding="utf-8")
    module = CDMModule(
        backbone or Toy2DBackbone(hidden=16, depth=1, fit_steps=20),
        CDMObjective(ca_weight=0.0),
        RandomSchedule(UniformLength(1, 3)),
        {"student": recipe(1e-2), "fake_score": recipe(1e-2)},
        samplers=SAMPLERS,
        ema=ema,
    )
    data = PromptDataModule(
        PromptFile(prompts), PromptFile(prompts), TRAIN_BATCH, val_batch_size=2, val_prompts=VAL_PROMPTS
    )
    defaults = {
        "logger": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": min(3, max_steps),
        "log_every_n_steps": 2,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | settings),
    )
    trainer.fit(module, data)
    return trainer, module


# ---- the student's average


def test_ema_follows_each_student_step(tmp_path: Path) -> None:
    recorder = Recorder()
    _, module = fit(tmp_path, [recorder], ema=EMA(decay=0.2))
    first = weights_of(module.backbone.build_network())
    expected = first
    for n, iteration in enumerate((1, 3, 5)):  # the student moves in the last of each two iterations
        decay = min(0.2, (1 + n) / (10 + n))
        student = recorder.students[iteration]
        expected = {name: decay * expected[name] + (1 - decay) * student[name] for name in expected}
    found = weights_of(module.networks.student_ema)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(found[name], first[name])
    assert module.ema_updates == 3
    assert module.evaluated_network is module.networks.student_ema


def test_without_ema_the_student_is_evaluated(tmp_path: Path) -> None:
    _, module = fit(tmp_path, [], max_steps=2)
    assert module.ema_updates == 0
    assert module.networks.student_ema is None  # nor is memory spent on it
    assert "student_ema" not in module.network_names
    assert module.evaluated_network is module.networks.student


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_unfit_decays_are_refused(decay: float) -> None:
    with pytest.raises(UserError, match="decay"):
        EMA(decay)


# ---- metrics of validation


class Points(nn.Module):
    """Features of the toy's pictures, with a parameter that must not reach a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return Toy2DBackbone().encode_images(images).flatten(1) * self.scale


def test_frechet_distance_is_that_of_the_validation_images(tmp_path: Path) -> None:
    recorder = Recorder()
    real = Toy2DBackbone().decode_latents(Toy2DBackbone().exact_samples([""] * 60, 0))
    callback = ValidationMetrics(MetricSuite({"frechet": Frechet(real.split(16), "points")}, {"points": Points()}))
    trainer, _ = fit(tmp_path, [recorder, callback])
    assert len(recorder.validations) == 2
    for sampler in ("student_2", "teacher_1"):
        images = recorder.images(sampler)
        assert len(images) == VAL_PROMPTS
        by_hand = frechet_distance(FeatureStatistics.of_features([Points()(real)]), Points()(images))
        assert float(trainer.callback_metrics[f"val/frechet/{sampler}"]) == pytest.approx(by_hand, rel=1e-4)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert not [name for name in content["state_dict"] if "scale" in name]
    assert "ValidationMetrics" not in str(content["callbacks"])


class RightHalf(Metric):
    """The mean of an image's right half."""

    def score(self, batch: ImageBatch) -> Tensor:
        assert len(batch.images) == len(batch.prompts) == len(batch.indices)
        return batch.images[..., 16:].mean((1, 2, 3))


class RightJudge:
    """Adherence is a right half that is brighter than the whole image."""

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[..., 16:].mean((1, 2, 3)) > images.mean((1, 2, 3))


def right_halves() -> ValidationMetrics:
    return ValidationMetrics(MetricSuite({"right_half": RightHalf(), "adherence": Adherence(RightJudge())}))


def test_scores_are_means_over_images_not_batches_and_are_kept_by_prompt(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer, _ = fit(tmp_path, [recorder, right_halves()])
    files = sorted((tmp_path / "scores").iterdir())
    assert [file.name for file in files] == ["iteration_0000003.csv", "iteration_0000006.csv"]
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    for sampler in ("student_2", "teacher_1"):
        images = recorder.images(sampler)
        expected = images[..., 16:].mean((1, 2, 3))
        found = float(trainer.callback_metrics[f"val/right_half/{sampler}"])
        assert found == pytest.approx(float(expected.mean()), rel=1e-5)
        share = (expected > images.mean((1, 2, 3))).float().mean()
        assert float(trainer.callback_metrics[f"val/adherence/{sampler}"]) == pytest.approx(float(share))
        kept = [row for row in rows if row["sampler"] == sampler]
        assert [int(row["prompt_index"]) for row in kept] == list(range(VAL_PROMPTS))
        assert [float(row["right_half"]) for row in kept] == pytest.approx(expected.tolist(), rel=1e-5)
        prompts = [prompt for outputs in recorder.validations[1] for prompt in outputs["prompts"]]
        assert [row["prompt"] for row in kept] == prompts


class Counting(nn.Module):
    """Features that count how often they are computed, of images and of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.images = self.texts = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += 1
        return images.flatten(1)[:, ::100]

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        self.texts += 1
        return torch.ones(len(prompts), 31)


def test_an_extractor_runs_once_a_batch_for_all_metrics(tmp_path: Path) -> None:
    counting, real = Counting(), torch.rand(6, 3, 32, 32)
    metrics = {"clip_score": CLIPScore("f"), "frechet": Frechet([real], "f"), "another": Frechet([real], "f")}
    fit(tmp_path, [ValidationMetrics(MetricSuite(metrics, {"f": counting}))], max_steps=3)
    batches = 3  # of 5 prompts, two at a time
    assert counting.images == 1 + batches * len(SAMPLERS) + 2  # once in the rehearsal, and once for each reference
    assert counting.texts == 1 + batches  # once in the rehearsal; the same prompts for all samplers


def test_a_metric_without_its_extractor_is_refused() -> None:
    with pytest.raises(UserError, match=r"metric.fid needs the feature extractor feature.inception, which is missing"):
        MetricSuite({"fid": Frechet([], "inception")}, {"clip": Points()})
    with pytest.raises(UserError, match=r"metric.fid must be a cdm_lightning Metric, not a Points"):
        MetricSuite({"fid": Points()})
    with pytest.raises(
        UserError, match=r"metric.clip_score needs features of prompts, but feature.clip cannot encode prompts"
    ):
        MetricSuite({"clip_score": CLIPScore()}, {"clip": Points()})
    with pytest.raises(UserError, match=r"metric.sampler: sampler is the name of a column of the results"):
        MetricSuite({"sampler": RightHalf()})


def test_scores_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "scores").write_text("a file in the place of the folder")
    trainer, _ = fit(tmp_path, [right_halves()], max_steps=3)
    assert "could not be written (File exists); the run continues" in capsys.readouterr().err
    assert "val/right_half/student_2" in trainer.callback_metrics


def test_features_that_are_not_finite_have_no_distance(tmp_path: Path) -> None:
    """The library's eigenvalues of such features would end the process."""
    broken = torch.full((4, 3), float("nan"))
    found = frechet_distance(FeatureStatistics.of_features([torch.rand(5, 3)]), broken)
    assert found is not None
    assert math.isnan(found)


def test_sanity_checks_are_not_measured(tmp_path: Path) -> None:
    real = torch.rand(4, 3, 32, 32)
    metrics = MetricSuite({"frechet": Frechet([real], "points"), "right_half": RightHalf()}, {"points": Points()})
    callbacks = [ValidationMetrics(metrics), SampleGrid(), TrainingProgress()]
    trainer, _ = fit(tmp_path, callbacks, max_steps=2, num_sanity_val_steps=1, val_check_interval=3)
    assert not [name for name in trainer.callback_metrics if name.startswith("val/")]
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "scores").exists()


# ---- pictures


def test_grids_show_the_first_prompts_at_each_validation(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, [recorder, SampleGrid(num_prompts=3)])
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["iteration_0000003.png", "iteration_0000006.png"]
    prompts = [prompt for outputs in recorder.validations[1] for prompt in outputs["prompts"]][:3]
    expected = picture({spec.name: recorder.images(spec.name)[:3] for spec in SAMPLERS}, prompts)
    with Image.open(files[1]) as file:
        assert file.tobytes() == expected.tobytes()
    with Image.open(files[0]) as file:
        assert file.tobytes() != expected.tobytes()  # the student has moved since


def test_grids_reach_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(tmp_path, [SampleGrid(2)], max_steps=3, logger=GuardedLogger(TensorBoardLogger(tmp_path, name="logs")))
    events = accumulator.EventAccumulator(str(tmp_path / "logs" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Images("val/samples")] == [3]


# ---- throughput


class Clock(L.Callback):
    """A clock that only moves where the run says so: 1 s a training batch, 100 s a validation batch."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_train_batch_start(self, *_: object) -> None:
        self.now += 1

    def on_validation_batch_start(self, *_: object) -> None:
        self.now += 100


def test_throughput_leaves_validation_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("cdm_lightning.callbacks.throughput.time", SimpleNamespace(perf_counter=clock.perf_counter))
    monitor = ThroughputMonitor()
    _, module = fit(tmp_path, [clock, monitor], logger=CSVLogger(tmp_path, name="logs"))
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("throughput/samples_per_second")]
    assert [float(row["throughput/samples_per_second"]) for row in rows] == [TRAIN_BATCH] * 3
    assert all(float(row["throughput/peak_memory_gib"]) > 0.05 for row in rows)
    for phase in ("rollout", "fake_score", "student"):
        seconds = [2 * float(row[f"throughput/{phase}_seconds"]) for row in rows]  # two iterations each
        assert min(seconds) > 0
        assert sum(seconds) == pytest.approx(module.timer.seconds[phase], rel=1e-3)


# ---- progress


def test_progress_prints_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdm_lightning.terminal.progress.LINE_EVERY", 0.0)
    fit(tmp_path, [right_halves(), TrainingProgress()])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading the networks"
    training = [line for line in lines if line.startswith("training: ")]
    assert training[0].startswith("training: 1/6, samples/s ")
    assert training[-1].startswith("training: 6/6, ") or "training: 6/6" in "\n".join(training)
    assert any("fake_score loss" in line and "student loss" in line and " left" in line for line in training)
    assert any(line.startswith("validating: 3/6") for line in lines)
    assert any(line.startswith("iteration 3: right_half/student_2 ") for line in lines)


def test_progress_draws_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    fit(tmp_path, [TrainingProgress()])
    shown = terminal.getvalue()
    assert "training: 100%" in shown
    assert "6/6" in shown
    assert "validating" in shown
    assert "samples/s=" in shown


# ---- the end of a run


def small_ladder(folder: Path) -> tuple[LadderEvaluation, MetricSuite]:
    clip = f"local-dir:{write_clip_folder(folder / 'clip')}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(ShapesClassifier().state_dict(), folder / "classifier.safetensors")
    prompts = [scene.caption for scene in draw_scenes(6, 1)]
    metrics = MetricSuite(
        {
            "frechet_real": Frechet(ShapesRenderings(prompts, count=20)),
            "frechet_teacher": FrechetToSampler("teacher 2 steps, guidance 2"),
            "clip_score": CLIPScore(),
            "adherence": Adherence(ShapesClassifier.load(folder / "classifier.safetensors")),
            "diversity": Diversity(prompts=2, images_per_prompt=2),
        },
        {"clip": OpenClipFeatures(clip)},
    )
    evaluation = LadderEvaluation(
        prompts=prompts,
        samplers=[SamplerSpec("teacher 2 steps, guidance 2", "teacher", 2, 2.0), SamplerSpec("student 1 step", nfe=1)],
        real_images=render_prompts,
        count=6,
        batch_size=4,
        shown=3,
    )
    return evaluation, metrics


def test_ladder_report_leaves_table_picture_and_student(
    tmp_path: Path, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    report = LadderReport(*small_ladder(tmp_path), export_nfe=2)
    backbone = SD3Backbone(str(tiny_pipeline_folder))
    trainer, module = fit(tmp_path, [report], backbone, max_steps=2, ema=EMA(), limit_val_batches=0)
    printed = capsys.readouterr().out
    for name in ("table.md", "metrics.json", "samples.png", "report.html", "student"):
        assert str(tmp_path / name) in printed
        assert (tmp_path / name).exists()
    rows = {row["sampler"]: row for row in json.loads((tmp_path / "metrics.json").read_text())["rows"]}
    assert list(rows) == ["real images", "teacher 2 steps, guidance 2", "student 1 step"]
    for name, row in rows.items():
        assert name in printed
        assert row["frechet_real"] > 0
        assert -100 <= row["clip_score"] <= 100
        assert 0 <= row["adherence"] <= 1
        assert row["diversity"] > 0
    assert (tmp_path / "student" / "model_index.json").is_file()
    assert f"{rows['student 1 step']['frechet_real']:.4g}" in (tmp_path / "student" / "README.md").read_text()

    # the same again: the table is printed, and nothing is measured or written
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    report = LadderReport(report.evaluation, report.metrics, export_nfe=2)  # of another start, which trains nothing
    report.on_fit_end(trainer, module)
    again = capsys.readouterr().out
    assert "The run is complete at iteration 2 and has been evaluated before." in again
    assert "teacher 2 steps, guidance 2" in again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert isinstance(report.metrics.metrics["clip_score"], CLIPScore)

    def is_evaluated_again() -> bool:
        report.on_fit_end(trainer, module)
        return "evaluated before" not in capsys.readouterr().out

    module.iteration = 3  # a longer run
    assert is_evaluated_again()
    assert json.loads((tmp_path / "metrics.json").read_text())["settings"]["iteration"] == 3
    for damaged in ("{ half", "[1]", '{"settings": null}', '{"settings": {}, "rows": []}'):
        (tmp_path / "metrics.json").write_text(damaged)
        assert is_evaluated_again()
    (tmp_path / "samples.png").unlink()
    assert is_evaluated_again()
    assert not is_evaluated_again()
    (tmp_path / "config.yaml").write_text("backbone: {}\nmetric: {clip_score: {feature: other}}\n")  # another option
    assert is_evaluated_again()
    report.on_train_batch_end(trainer, module)  # and whatever has been trained
    assert is_evaluated_again()


@pytest.mark.parametrize("options", [{"export_nfe": 0}, {"export_folder": "checkpoints"}])
def test_unfit_exports_of_the_ladder_are_refused_at_once(options: dict) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=rf"callbacks.ladder.{name}={value} must"):
        LadderReport(LadderEvaluation(prompts=["a"] * 2, count=2), MetricSuite(), **options)


def test_ladder_report_refuses_a_foreign_folder_before_training(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.txt").write_text("precious")
    evaluation = LadderEvaluation(prompts=["a"] * 2, count=2)
    recorder = Recorder()
    with pytest.raises(UserError, match="was not written by an export"):
        fit(tmp_path, [recorder, LadderReport(evaluation, MetricSuite())])
    assert not recorder.students
