"""Generation and the ladder on a mixture whose samples are known, and on a tiny Stable Diffusion 3 pipeline."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.backbones.toy2d import MODES, RADIUS, WIDTH, MixtureVelocity, Toy2DBackbone
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.core.schedules import inference_sigmas
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.ladder import REAL, STEPS, LadderEvaluation, LadderResult
from cdm_lightning.evaluation.pictures import picture
from cdm_lightning.evaluation.report import csv_text, markdown_table, save_report, table
from cdm_lightning.evaluation.samplers import SamplerSpec, device_of, generate
from cdm_lightning.metrics.adherence import Adherence
from cdm_lightning.metrics.base import ImageBatch, Metric
from cdm_lightning.metrics.diversity import Diversity
from cdm_lightning.metrics.frechet import Frechet, FrechetToSampler
from cdm_lightning.metrics.suite import MetricSuite

PROMPTS = ["a large red circle", "a small blue square on the left", "a ring", "", "a green cross at the top"]


@pytest.fixture(scope="module")
def sd3(tiny_pipeline_folder: Path) -> SD3Backbone:
    backbone = SD3Backbone(str(tiny_pipeline_folder))
    backbone.setup(torch.device("cpu"))
    return backbone


@pytest.fixture(scope="module")
def toy() -> Toy2DBackbone:
    return Toy2DBackbone(hidden=16, depth=1, fit_steps=20)


class Points(nn.Module):
    """Features of the toy's pictures: the point (x, y) that is shown."""

    def forward(self, images: Tensor) -> Tensor:
        return Toy2DBackbone().encode_images(images).flatten(1)


# ---- generate


def test_a_network_in_host_memory_computes_on_the_device_of_its_mesh(monkeypatch) -> None:
    """`strategy.on_cpu=[student_ema]` on a GPU: noise on the CPU would be computed without the GPU's autocast."""
    network = nn.Linear(2, 2)
    assert device_of(network) == torch.device("cpu")
    mesh = DeviceMesh("meta", torch.tensor([0]), _init_backend=False, _rank=0)  # one rank without a process group
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(network.weight.shape, (2, 1), torch.float32))
    shard = DTensor(network.weight.detach(), spec, requires_grad=False)
    assert shard.device == torch.device("cpu")
    monkeypatch.setattr(network, "parameters", lambda: iter([shard]))
    assert device_of(network) == torch.device("meta")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_do_not_depend_on_the_batch(sd3: SD3Backbone, guidance_scale: float) -> None:
    network, spec = sd3.build_teacher(), SamplerSpec("s", "teacher", 2, guidance_scale)

    def make(batch_size: int, order: Sequence[int] = range(len(PROMPTS))) -> Tensor:
        return generate(sd3, network, spec, [PROMPTS[i] for i in order], list(order), 7, batch_size)

    together = make(5)
    assert together.shape == (5, 3, 32, 32)
    assert together.min() >= 0
    assert together.max() <= 1
    for batch_size in (1, 2, 4):
        torch.testing.assert_close(make(batch_size), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(make(2, [4, 1, 0]), together[[4, 1, 0]], rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3  # the tolerance above can tell images apart


def test_noise_is_a_function_of_seed_and_index(sd3: SD3Backbone) -> None:
    network, spec = sd3.build_teacher(), SamplerSpec("s", "teacher", 1)

    def make(index: int, seed: int) -> Tensor:
        return generate(sd3, network, spec, PROMPTS[:1], [index], seed, 1)

    assert torch.equal(make(3, 0), make(3, 0))
    assert not torch.allclose(make(3, 0), make(4, 0), atol=1e-3)
    assert not torch.allclose(make(3, 0), make(3, 1), atol=1e-3)


def test_guided_images_are_those_of_the_stock_pipeline(sd3: SD3Backbone, tiny_pipeline_folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS[:2],
        negative_prompt=["", ""],
        num_inference_steps=3,
        sigmas=[1.0, 2 / 3, 1 / 3],
        guidance_scale=2.0,
        latents=evaluation_noise(0, [0, 1], sd3.latent_shape, "cpu"),
        output_type="pt",
    ).images
    found = generate(sd3, sd3.build_teacher(), SamplerSpec("s", "teacher", 3, 2.0), PROMPTS[:2], [0, 1], 0, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_steps_follow_the_shared_sigmas_and_calls_are_counted(toy: Toy2DBackbone) -> None:
    class Watched(MixtureVelocity):
        def forward(self, x: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
            seen.extend(sigma.tolist())
            assert not self.training
            return super().forward(x, sigma, weights)

    for spec in (SamplerSpec("s", "teacher", 5), SamplerSpec("s", "teacher", 5, 1.5)):
        network, seen = Watched(), []
        generate(toy, network, spec, ["north"], [0], 0, 1)
        assert len(seen) == spec.network_calls
        assert sorted(set(seen)) == inference_sigmas(5, toy.shift_sigmas)[:-1].flip(0).tolist()
        assert network.training  # as it was


@pytest.mark.parametrize("arguments", [{"nfe": 0}, {"network": "critic"}])
def test_unfit_samplers_are_refused(arguments: dict) -> None:
    with pytest.raises(UserError, match="sampler 's'"):
        SamplerSpec("s", **arguments)


# ---- the ladder


class ExactImages:
    """Pictures of points of the mixture: what a perfect sampler would make of these prompts."""

    def __call__(self, prompts: Sequence[str], indices: Sequence[int], seed: int) -> Tensor:
        backbone = Toy2DBackbone()
        points = [
            backbone.exact_samples([prompt], 100 * seed + index) for prompt, index in zip(prompts, indices, strict=True)
        ]
        return backbone.decode_latents(torch.cat(points))


class ModeJudge:
    """Whether the point lies within 4 deviations of the centre of the prompt's mode."""

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        centres = MixtureVelocity().centres[[MODES.index(prompt) for prompt in prompts]]
        return (Points()(images) - centres).norm(dim=1) < 4 * WIDTH


class ModeNumber(Metric):
    """A metric whose answer is known: the number of each image's prompt among the modes."""

    def score(self, batch: ImageBatch) -> Tensor:
        return torch.tensor([float(MODES.index(prompt)) for prompt in batch.prompts])


COUNT = 256


def width_after_euler(nfe: int) -> float:
    """Deviation of one mode's samples after Euler steps of its velocity, which is linear around its centre's path."""
    s, following = torch.linspace(1, 1 / nfe, nfe), torch.linspace(1 - 1 / nfe, 0, nfe)
    slope = (s - (1 - s) * WIDTH**2) / ((1 - s) ** 2 * WIDTH**2 + s**2)
    return float((1 + (following - s) * slope).prod())


@pytest.fixture(scope="module")
def result(toy: Toy2DBackbone) -> LadderResult:
    metrics = MetricSuite(
        {
            "frechet_real": Frechet(ExactImages()(list(MODES) * 128, range(1024), 5).split(100), "points"),
            "frechet_teacher": FrechetToSampler("s2", "points"),  # any sampler can be: this one is far from the data
            "number": ModeNumber(),
            "adherence": Adherence(ModeJudge()),
            "diversity": Diversity("points", prompts=64, images_per_prompt=3),
        },
        {"points": Points()},
    )
    evaluation = LadderEvaluation(
        prompts=list(MODES) * 40,
        samplers=[SamplerSpec("t50", "teacher", 50), SamplerSpec("t1", "teacher", 1), SamplerSpec("s2", "student", 2)],
        real_images=ExactImages(),
        count=COUNT,
        batch_size=100,
        shown=4,
    )
    return evaluation.run(metrics, toy, {"teacher": toy.build_teacher(), "student": toy.build_network()}, silent=True)


def test_ladder_figures_are_those_of_the_mixture(result: LadderResult) -> None:
    rows = {row["sampler"]: row for row in result.rows}
    assert list(rows) == [REAL, "t50", "t1", "s2"]
    # data: modes on a circle, so a mean of 0 and a trace of the covariance of r^2 + 2 w^2; one step ends at the centres
    assert rows["t1"]["frechet_real"] == pytest.approx(
        2 * (RADIUS / 2**0.5 - (RADIUS**2 / 2 + WIDTH**2) ** 0.5) ** 2, abs=1e-3
    )
    assert rows["t1"]["diversity"] == pytest.approx(0, abs=1e-4)
    # two points of a mode of width w are w pi^(1/2) apart in the mean; 50 Euler steps make it somewhat narrower
    assert rows[REAL]["diversity"] == pytest.approx(WIDTH * torch.pi**0.5, rel=0.1)
    assert rows["t50"]["diversity"] == pytest.approx(width_after_euler(50) * torch.pi**0.5, rel=0.1)
    assert rows["t50"]["frechet_real"] < 0.01
    assert rows["s2"]["frechet_real"] > 0.05  # a student that was hardly fitted
    assert not [key for key in rows["s2"] if key.startswith("frechet_teacher")]
    assert rows[REAL]["frechet_teacher_other_noise"] == pytest.approx(rows["s2"]["frechet_real"], rel=0.05)
    assert [row["adherence"] for row in result.rows[:3]] == pytest.approx([1, 1, 1], abs=0.01)
    assert rows["s2"]["adherence"] < 0.9
    assert [row["number"] for row in result.rows] == [3.5] * 4
    assert [row["network_calls"] for row in result.rows] == [0, 50, 1, 2]
    assert "seconds_per_image" not in rows[REAL]
    assert rows["t50"]["seconds_per_image"] > rows["t1"]["seconds_per_image"] > 0


def test_ladder_shows_the_same_prompts_and_noise(result: LadderResult, toy: Toy2DBackbone) -> None:
    assert result.prompts == list(MODES[:4])
    assert all(images.shape == (4, 3, 32, 32) for images in result.images.values())
    spec = SamplerSpec("s2", "student", 2)
    again = generate(toy, toy.build_network(), spec, MODES[:4], range(4), seed=0, batch_size=1)
    torch.testing.assert_close(result.images["s2"], again, rtol=0, atol=1e-4)


def test_ladder_does_not_depend_on_the_batch(toy: Toy2DBackbone) -> None:
    def run(batch_size: int) -> LadderResult:
        metrics = MetricSuite(
            {
                "frechet": Frechet([ExactImages()(MODES, range(8), 1)], "points"),
                "adherence": Adherence(ModeJudge()),
                "diversity": Diversity("points", prompts=3),
            },
            {"points": Points()},
        )
        evaluation = LadderEvaluation(
            prompts=list(MODES),
            samplers=[SamplerSpec("t", "teacher", 3), SamplerSpec("s", "student", 3)],
            count=7,
            batch_size=batch_size,
            shown=5,
        )
        return evaluation.run(
            metrics, toy, {"teacher": toy.build_teacher(), "student": toy.build_network()}, silent=True
        )

    first, second = run(2), run(7)
    for row, other in zip(first.rows, second.rows, strict=True):
        assert row["frechet"] == pytest.approx(other["frechet"], rel=1e-3)
        assert row["diversity"] == pytest.approx(other["diversity"], rel=1e-3)
        assert row["adherence"] == other["adherence"]
    assert first.scores == second.scores
    assert first.images["s"].shape == second.images["s"].shape == (5, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"samplers": [SamplerSpec("a"), SamplerSpec("a")]}, "same name"),
        ({"count": 9, "prompts": ["a"]}, "callbacks.ladder.evaluation.prompts: .* 1 prompts; give at least 2"),
        ({"count": 1}, "callbacks.ladder.evaluation.count=1 is too small; set it to at least 2"),
        ({"samplers": []}, "samplers is empty; give at least one sampler"),
        ({"shown": 0}, "shown=0 is too small; set it to at least 1"),
    ],
)
def test_contradictory_settings_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        LadderEvaluation(**({"prompts": list(MODES), "count": 8} | changes))


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (
            FrechetToSampler("nobody", "points"),
            "metric.m.sampler='nobody' must be one of the evaluated samplers: teacher 50 steps",
        ),
        (Diversity("points", prompts=9), "metric.m.prompts=9 is more than the 8 prompts"),
    ],
)
def test_metrics_that_do_not_fit_the_evaluation_are_refused(metric: Metric, text: str) -> None:
    with pytest.raises(UserError, match=text):
        LadderEvaluation(list(MODES), count=8).check(MetricSuite({"m": metric}, {"points": Points()}))


def test_the_default_ladder_is_whole() -> None:
    LadderEvaluation(prompts=list(MODES) * 64)
    assert [spec.network_calls for spec in STEPS] == [50, 100, 100, 4, 8, 8, 1, 2, 4, 8]


# ---- the report


def test_tables_are_aligned_and_complete(result: LadderResult) -> None:
    lines = table(result.rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:5] == ["sampler", "frechet", "real", "frechet", "teacher"]
    assert lines[0].rstrip().endswith("network calls  seconds per image")
    assert lines[2].startswith("real images")
    assert lines[5].split().count("-") == 2  # a sampler has no distance to itself, from the same noise or from another
    cells = markdown_table(result.rows).splitlines()
    assert len(cells) == 2 + 4
    assert {line.count("|") for line in cells} == {10}


def test_report_is_written_whole(result: LadderResult, tmp_path: Path) -> None:
    paths = save_report(result, tmp_path / "run")
    save_report(result, tmp_path / "run")  # over an earlier one
    assert (
        {path.name for path in (tmp_path / "run").iterdir()}
        == set(paths)
        == {"metrics.json", "table.md", "scores.csv", "samples.png"}
    )
    content = json.loads(paths["metrics.json"].read_text())
    assert [row["sampler"] for row in content["rows"]] == [row["sampler"] for row in result.rows]
    assert content["rows"][2]["frechet_real"] == result.rows[2]["frechet_real"]
    assert content["settings"]["count"] == COUNT
    assert content["settings"]["frechet_real_reference_images"] == 1024
    with paths["scores.csv"].open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == 4 * COUNT
    assert list(scores[0]) == ["sampler", "prompt_index", "prompt", "number", "adherence"]
    mine = [row for row in scores if row["sampler"] == "s2"]
    assert [int(row["prompt_index"]) for row in mine] == list(range(COUNT))
    assert sum(float(row["adherence"]) for row in mine) / COUNT == pytest.approx(result.rows[3]["adherence"])


def test_scores_of_any_prompt_are_read_back(tmp_path: Path) -> None:
    prompts = ["a, b", 'a "quoted" one', "two\nlines", "a\rreturn", "", "\t, é"]
    rows = [{"sampler": "s", "prompt_index": i, "prompt": text, "score": 0.5} for i, text in enumerate(prompts)]
    (tmp_path / "scores.csv").write_text(csv_text(rows), encoding="utf-8", newline="")
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == prompts


def test_the_ladder_keeps_no_images_but_those_that_it_shows(result: LadderResult) -> None:
    for images in result.images.values():
        assert images.untyped_storage().nbytes() == images.numel() * images.element_size()
    assert all(kept.shown.untyped_storage().nbytes() < 5 * 3 * 32 * 32 * 4 for kept in result.measured.values())


def test_picture_has_each_image_in_its_place() -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 0]])[:, :, None, None]
    images = {"teacher": colours[:2].expand(2, 3, 32, 32), "student, 4 steps": colours[2:].expand(2, 3, 32, 32)}
    made = picture(images, ["a red square", "a prompt that is far too long for one line above such a small picture"])
    pixels = torch.tensor(list(made.get_flattened_data())).reshape(made.height, made.width, 3)
    for colour, count in zip(colours[:, :, 0, 0] * 255, [96 * 96] * 4, strict=True):
        assert int((pixels == colour).all(2).sum()) == count
    where = [(pixels == colour).all(2).nonzero()[0].tolist() for colour in colours[:, :, 0, 0] * 255]
    assert where[0][0] == where[1][0] < where[2][0] == where[3][0]
    assert where[0][1] == where[2][1] < where[1][1] == where[3][1]
    top = pixels[: where[0][0], where[0][1] :]
    assert (top.float().mean(2) < 128).sum() > 50  # the prompts are written on it


def test_large_images_are_made_smaller() -> None:
    made = picture({"a": torch.rand(2, 3, 512, 1024)}, ["x", "y"])
    assert isinstance(made, Image.Image)
    assert made.width < 700
