"""Exported students: every number of steps, the guidance that must not be forgotten, leftovers, and the ladder's two distances."""

import json
import os
import shutil
import signal

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import FAMILIES

from cdm_lightning import export
from cdm_lightning.backbones.toy2d import PointsOfPictures, Toy2DBackbone
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.evaluation.ladder import REAL, LadderEvaluation
from cdm_lightning.evaluation.report import table
from cdm_lightning.evaluation.samplers import SamplerSpec, generate
from cdm_lightning.exporting.pipeline import how_to_call
from cdm_lightning.files import replacing_folder
from cdm_lightning.metrics.frechet import FrechetToSampler
from cdm_lightning.metrics.suite import MetricSuite

PROMPTS = ["a red circle", "a ring"]
BAKING = ("sd3", "sana")  # whose pipelines leave the spacing of steps to the scheduler


@pytest.fixture(scope="module", params=BAKING)
def exported(request, tiny_folder, tmp_path_factory):
    """(backbone, network, folder) of a student exported for four steps."""
    family = FAMILIES[request.param]
    backbone = family.backbone(str(tiny_folder(request.param)), **family.options)
    backbone.setup(torch.device("cpu"))
    network = backbone.build_network().eval()
    folder = tmp_path_factory.mktemp("exported") / "student"
    return backbone, network, export.export_pipeline(backbone, network, folder, nfe=4)


def test_every_number_of_steps_runs_the_students_own_sigmas(exported):
    backbone, network, folder = exported
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((folder / "call.json").read_text())
    for nfe in (1, 2, 3, 4, 8):
        ours = generate(backbone, network, SamplerSpec("s", nfe=nfe), PROMPTS, range(2), seed=0, batch_size=2)
        noise = evaluation_noise(0, range(2), backbone.latent_shape, "cpu")
        theirs = pipeline(PROMPTS, latents=noise, output_type="pt", **call | {"num_inference_steps": nfe}).images
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_card_and_next_command_say_that_the_default_guidance_ruins_a_student(exported, capsys):
    _, _, folder = exported
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Pass `guidance_scale=1.0` in every call: the pipeline's default, " in card
    assert "guidance_scale=1.0" in how_to_call(folder)


def test_a_variant_is_refused_by_diffusers_in_its_own_words(exported):
    """An IndexError came from a folder inside the scheduler's."""
    for variant in ("fp16", "bf16"):
        with pytest.raises(ValueError, match=f"variant={variant}"):
            DiffusionPipeline.from_pretrained(exported[2], variant=variant)


@pytest.mark.parametrize("place", ["scheduler/unbaked", "training_scheduler"])
def test_folders_of_older_versions_are_read_as_before(exported, tmp_path, place):
    backbone, _, folder = exported
    older = shutil.copytree(folder, tmp_path / "older")
    FlowMatchEulerDiscreteScheduler(shift=2.0, shift_terminal=0.5).save_pretrained(older / "scheduler")
    backbone.scheduler.save_pretrained(older / place)
    again = type(backbone)(str(older))
    assert again.scheduler.config.shift == backbone.scheduler.config.shift
    assert not again.scheduler.config.shift_terminal


def test_the_next_export_removes_what_a_killed_one_left(tmp_path):
    for number in (signal.SIGKILL, signal.SIGTERM):
        child = os.fork()
        if not child:
            with replacing_folder(tmp_path / "student") as temporary:
                (temporary / "weights").write_bytes(bytes(1000))
                os.kill(os.getpid(), number)
        os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) >= 1
    (tmp_path / ".other.1.tmp").mkdir()  # not ours
    with replacing_folder(tmp_path / "student") as temporary:
        (temporary / "weights").write_bytes(b"1")
    assert {path.name for path in tmp_path.iterdir()} == {"student", ".other.1.tmp"}


def test_the_ladder_names_the_distance_on_the_same_noise_and_that_on_other_noise():
    backbone = Toy2DBackbone(hidden=16, depth=1, fit_steps=20)
    backbone.setup(torch.device("cpu"))
    teacher = backbone.build_teacher()
    metrics = MetricSuite({"frechet_teacher": FrechetToSampler("t", "pixels")}, {"pixels": PointsOfPictures()})
    samplers = [SamplerSpec("t", "teacher", 8), SamplerSpec("t2", "teacher", 2), SamplerSpec("s", "student", 8)]
    evaluation = LadderEvaluation(
        prompts=["north", "south"] * 16,
        samplers=samplers,
        count=32,
        batch_size=20,
        real_images=lambda prompts, indices, seed: torch.rand(len(prompts), 3, *backbone.image_size),
    )
    result = evaluation.run(metrics, backbone, {"teacher": teacher, "student": teacher}, silent=True)
    rows = {row["sampler"]: row for row in result.rows}
    assert rows["s"]["frechet_teacher_same_noise"] == pytest.approx(0, abs=1e-4)  # the same network: the same images
    assert rows["s"]["frechet_teacher_other_noise"] > 1e-3  # other images of the same distribution
    assert "frechet_teacher_same_noise" in rows["t2"]
    assert "frechet_teacher_other_noise" not in rows["t2"]
    assert "frechet_teacher_same_noise" not in rows[REAL]
    heads = {head.strip() for head in table(result.rows).splitlines()[0].split("  ")}
    assert {"frechet teacher same noise", "frechet teacher other noise"} <= heads
