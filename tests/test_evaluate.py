"""`python -m cdm_lightning.evaluate`: the same figures as a run's own table, intervals, restarts, and mistakes in one line."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from cdm_lightning.config import asset_path
from cdm_lightning.core.schedules import constant_shift, inference_sigmas
from cdm_lightning.errors import UserError
from cdm_lightning.evaluate import build_metrics, evaluate, main, read_model, read_prompts
from cdm_lightning.evaluation import measuring, protocol
from cdm_lightning.evaluation.intervals import compare, interval
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.metrics.base import ImageBatch, Metric
from cdm_lightning.metrics.frechet import FeatureStatistics, Frechet
from cdm_lightning.metrics.mind import MIND
from cdm_lightning.metrics.suite import Collected, MetricSuite
from cdm_lightning.run.models import open_run

TINY = str(asset_path("tiny_sd3"))
SHAPES = read_prompts("shapes_heldout", 6)
BOTH = ("colour", "shapes_adherence")


def tiny(*words: str) -> list:
    return [read_model([TINY, *words])]


# ---- intervals


class Brightness(Metric):
    """The mean of the images."""

    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images.mean((1, 2, 3))


def measured(suite: MetricSuite, images: Tensor) -> Collected:
    collected = Collected()
    numbers = range(len(images))
    suite.measure(collected, images, [f"prompt {i}" for i in numbers], numbers)
    return collected


def test_interval_of_a_mean_has_the_width_of_the_closed_form():
    scores = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    suite = MetricSuite({"brightness": Brightness()})
    found = compare(suite, {"s": measured(suite, scores.float()[:, None, None, None])}, "s", resamples=2000)
    mean = found.figures["s"]["brightness"]
    assert mean.value == pytest.approx(float(scores.mean()), abs=1e-6)
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * float(scores.std()) / math.sqrt(400), rel=0.1)
    assert found.differences == {}


def test_a_biased_distance_keeps_its_value_in_the_middle_of_its_interval():
    assert str(interval(1.0, [2.0, 3.0, 4.0], is_biased=True)) == "1 (0.05 to 1.95)"
    assert str(interval(3.0, [2.0, 3.0, 4.0])) == "3 (2.05 to 3.95)"
    with pytest.raises(ValueError, match="at least 2"):
        interval(1.0, [1.0])


class Means(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize(("kind", "tries", "fewest"), [("mean", 60, 52), ("distance", 30, 25)])
def test_paired_intervals_of_two_equal_models_contain_0(kind, tries, fewest):
    """Both models draw from the same distribution; prompts differ in difficulty, which both share. 95 of 100 are expected."""
    hits, narrower = 0, 0
    rng = torch.Generator().manual_seed(1)
    exact = FeatureStatistics.of_features([torch.randn(4000, 3, generator=rng)])
    metric = Brightness() if kind == "mean" else Frechet(exact, "means")
    suite = MetricSuite({"m": metric}, {"means": Means()})
    for number in range(tries):
        prompts = torch.randn(80, 3, 1, 1, generator=rng)
        a, b = (prompts + 0.5 * torch.randn(80, 3, 1, 1, generator=rng) for _ in range(2))
        found = compare(suite, {"a": measured(suite, a), "b": measured(suite, b)}, "a", 60, seed=number)
        gap, own = found.differences["b"]["m"], found.figures["b"]["m"]
        hits += gap.contains(0)
        narrower += gap.high - gap.low < own.high - own.low
    assert hits >= fewest  # fewer have a probability below .5 % if each interval contains 0 in 95 % of all cases
    if kind == "mean":
        assert narrower >= 55  # the prompts' difficulty drops out of the difference


def test_a_real_difference_is_found():
    rng = torch.Generator().manual_seed(2)
    prompts = torch.randn(80, 3, 1, 1, generator=rng)
    suite = MetricSuite({"m": Brightness()})
    samplers = {"a": measured(suite, prompts), "b": measured(suite, prompts + 0.1)}
    gap = compare(suite, samplers, "a", 100).differences["b"]["m"]
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-6)


def test_metrics_with_wide_features_have_no_intervals(monkeypatch):
    monkeypatch.setattr("cdm_lightning.evaluation.intervals.WIDEST", 2)
    exact = FeatureStatistics.of_features([torch.randn(9, 3, generator=torch.Generator().manual_seed(3))])
    suite = MetricSuite({"m": Frechet(exact, "means")}, {"means": Means()})
    found = compare(suite, {"a": measured(suite, torch.rand(5, 3, 2, 2))}, "a", 10)
    assert found.left_out == ["m"]
    assert found.figures == {"a": {}}
    suite = MetricSuite({"m": MIND(sampler="a", feature="means", projections=3)}, {"means": Means()})
    samplers = {name: measured(suite, torch.rand(5, 3, 2, 2)) for name in "ab"}
    quick = compare(suite, samplers, "a", 10)
    assert not quick.left_out
    assert quick.figures["b"].keys() == {"m"}


def test_an_interval_without_width_is_told():
    suite = MetricSuite({"m": Brightness()})
    samplers = {"a": measured(suite, torch.ones(20, 3, 1, 1)), "b": measured(suite, torch.rand(20, 3, 1, 1))}
    (told,) = compare(suite, samplers, "b", 100).missing
    assert told.startswith("m of a: all images have the same score")
    assert "up to about 0.15 of the images" in told


# ---- shifts


def test_shift_is_that_of_sd3_and_1_changes_nothing():
    assert constant_shift(3.0)(torch.tensor([1.0, 0.5, 0.25])).tolist() == pytest.approx([1, 0.75, 0.5])
    assert inference_sigmas(4, constant_shift(1.0)).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert str(SamplerSpec("a")) == repr(SamplerSpec("a")).replace(", shift=None", "")
    assert "shift=2" in str(SamplerSpec("a", shift=2.0))


def test_own_shift_of_the_family_gives_the_same_images_as_its_factor(tmp_path):
    found = evaluate(tiny("steps=2"), SHAPES, tmp_path / "a").ladder
    factor = tiny()[0].opened.backbone.scheduler.config.shift
    same = evaluate(tiny("steps=2", f"shift={factor:g}"), SHAPES, tmp_path / "b").ladder
    other = evaluate(tiny("steps=2", f"shift={factor + 2:g}"), SHAPES, tmp_path / "c").ladder
    own, shifted, changed = (next(iter(one.images.values())) for one in (found, same, other))
    assert torch.allclose(own, shifted, atol=1e-5)
    assert not torch.allclose(own, changed, atol=1e-3)


# ---- the whole command


def test_grid_files_and_restart(tmp_path, monkeypatch):
    def run(**changes):
        options = {"metrics": BOTH, "resamples": 20, "save_images": True} | changes
        return evaluate(tiny("name=t", "steps=1,2", "guidance=1,1.5"), SHAPES, tmp_path / "out", **options)

    found = run()
    names = ["t 1 step", "t 1 step, guidance 1.5", "t 2 steps", "t 2 steps, guidance 1.5"]
    assert [row["sampler"] for row in found.ladder.rows] == names
    assert [row["network_calls"] for row in found.ladder.rows] == [1, 2, 2, 4]
    assert set(found.comparison.differences) == set(names[1:])
    content = json.loads((tmp_path / "out/intervals.json").read_text())
    assert content["figures"]["t 2 steps"]["adherence"][0] == found.ladder.rows[2]["adherence"]
    assert content["prompts"] == 6

    page = (tmp_path / "out/report.html").read_text()
    assert page.count('src="data:image/') == 4 * 6
    assert page.count(f">{found.comparison.figures['t 2 steps']['adherence'].value:.3f}<") >= 1

    lines = [json.loads(line) for path in (tmp_path / "out/images").rglob("manifest.jsonl") for line in path.open()]
    assert len(lines) == 4 * 6
    one = next(line for line in lines if line["model"] == "t 2 steps" and line["prompt_index"] == 3)
    assert (one["prompt"], one["seed"]) == (SHAPES[3], 0)
    with Image.open(tmp_path / "out/images" / one["file"]) as image:
        assert (to_tensor(image) - found.ladder.images["t 2 steps"][3]).abs().max() <= 0.5 / 255 + 1e-6

    monkeypatch.setattr(measuring, "generate", lambda *_: pytest.fail("a finished sampler was run again"))
    again = run()
    assert again.ladder.rows == found.ladder.rows
    assert again.comparison == found.comparison
    assert (tmp_path / "out/report.html").read_text().count('src="data:image/') == 4 * 6
    for name, images in found.ladder.images.items():
        assert torch.equal(images, again.ladder.images[name])
    with pytest.raises(pytest.fail.Exception, match="run again"):
        run(seed=1)  # other noise: the stored measurements do not count
    with pytest.raises(pytest.fail.Exception, match="run again"):
        run(metrics=["colour"])
    monkeypatch.undo()
    picture = tmp_path / "out/images" / one["file"]
    picture.unlink()
    run()
    assert picture.is_file()  # the sampler was run again, since one of its images was gone


def test_a_stopped_evaluation_repeats_only_the_sampler_that_was_running(tmp_path, monkeypatch):
    made, generate = [], measuring.generate

    def stopping(backbone, network, spec, *rest):
        made.append(spec.name)
        if len(set(made)) == 2 and stopping.stop:
            raise KeyboardInterrupt
        return generate(backbone, network, spec, *rest)

    stopping.stop = True
    monkeypatch.setattr(measuring, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny("name=t", "steps=1,2"), SHAPES, tmp_path)
    stopping.stop = False
    made.clear()
    evaluate(tiny("name=t", "steps=1,2"), SHAPES, tmp_path)
    assert set(made) == {"t 2 steps"}


@pytest.mark.parametrize("size", [1, 4])
def test_batch_size_changes_figures_by_rounding_alone(size, tmp_path):
    rows = [
        evaluate(tiny("steps=2"), SHAPES, tmp_path / str(n), BOTH, batch_size=n, resamples=5).ladder.rows[0]
        for n in (6, size)
    ]
    for name in ("colour_brightness", "colour_saturation", "colour_contrast", "adherence"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-5)


def test_a_run_is_measured_as_its_own_table_says(toy_run, prompt_file, tmp_path):
    few = "callbacks.ladder.evaluation.count=8"
    trained = toy_run("callbacks=ladder", "metric=[energy_distance]", few, "callbacks.ladder.export_nfe=4")
    table = {row["sampler"]: row for row in json.loads((trained.folder / "metrics.json").read_text())["rows"]}
    models = [read_model([str(trained.folder), "name=student", "steps=1,2,4,8"])]
    prompts = read_prompts(str(prompt_file), 8)
    found = evaluate(models, prompts, tmp_path / "out", ["energy_distance"], count=8, resamples=20)
    for row in found.ladder.rows:
        assert row["energy_distance"] == pytest.approx(table[row["sampler"]]["energy_distance"], abs=1e-6)


def test_few_images_are_said(tmp_path):
    options = ["metric.frechet_real.reference.count=16", "metric.frechet_real.reference.captions=6"]
    found = evaluate(tiny("steps=1"), SHAPES, tmp_path, ["shapes_frechet"], options, resamples=5)
    assert [text for text in found.cautions if "6 images are too few" in text]
    assert math.isfinite(found.ladder.rows[0]["frechet_real"])


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A copy of the bundled pipeline that a test may change."""
    return Path(shutil.copytree(TINY, tmp_path / "own"))


def double(file: Path) -> None:
    """Multiply all tensors of a safetensors file by 2."""
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)


def test_other_weights_under_the_same_path_are_measured_anew(own_model, tmp_path):
    first, same = (evaluate([read_model([str(own_model), "steps=1"])], SHAPES, tmp_path / "out") for _ in range(2))
    double(next((own_model / "vae").glob("*.safetensors")))
    other = evaluate([read_model([str(own_model), "steps=1"])], SHAPES, tmp_path / "out")
    brightness = [found.ladder.rows[0]["colour_brightness"] for found in (first, same, other)]
    assert brightness[0] == brightness[1] != brightness[2]
    assert first.ladder.settings["models"] != other.ladder.settings["models"]


def test_the_pretrained_pipeline_of_a_run_belongs_to_its_weights(monkeypatch, tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    student = SimpleNamespace(
        backbone=SimpleNamespace(folder=folder), stored=SimpleNamespace(path=tmp_path / "weights.safetensors")
    )
    monkeypatch.setattr("cdm_lightning.run.student.open_student", lambda model: student)
    opened = open_run("a run", None)
    before = opened.digest()
    (folder / "README.md").write_text("a card changes no image")
    assert opened.digest() == before
    double(next((folder / "transformer").glob("*.safetensors")))
    changed = opened.digest()
    assert changed != before
    (tmp_path / "weights.safetensors").write_bytes(b"y")
    assert opened.digest() not in (before, changed)


def test_other_weights_of_a_metric_are_other_settings(tmp_path):
    folder = Path(shutil.copytree(asset_path("tiny_clip"), tmp_path / "clip"))
    options = [f"feature.clip.model=local-dir:{folder}"]
    before = build_metrics(["shapes_clip_score"], options)[1]
    assert build_metrics(["shapes_clip_score"], options)[1] == before
    double(next(folder.glob("*.safetensors")))
    assert build_metrics(["shapes_clip_score"], options)[1] != before


DAMAGES = {
    "no tensors": lambda tensors, header: (tensors.clear(), tensors.update(x=torch.zeros(1))),
    "no features": lambda tensors, header: tensors.pop("features/colour"),
    "fewer rows": lambda tensors, header: tensors.update({"features/colour": tensors["features/colour"][:2].clone()}),
    "other indices": lambda tensors, header: tensors.update(indices=tensors["indices"] + 100),
    "seconds of text": lambda tensors, header: header.update(seconds="x"),
    "no flag": lambda tensors, header: header.pop("has_noise"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_measurements_are_made_again(damage, tmp_path):
    first = evaluate(tiny("steps=1"), SHAPES, tmp_path / "out")
    path = next((tmp_path / "out/measured").iterdir())
    with safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    DAMAGES[damage](tensors, header)
    save_file(tensors, path, metadata=header)
    again = evaluate(tiny("steps=1"), SHAPES, tmp_path / "out")
    assert {**again.ladder.rows[0], "seconds_per_image": 0} == {**first.ladder.rows[0], "seconds_per_image": 0}


def test_a_link_in_place_of_measurements_is_not_followed(tmp_path):
    evaluate(tiny("steps=1"), SHAPES, tmp_path / "out")
    path = next((tmp_path / "out/measured").iterdir())
    path.unlink()
    (tmp_path / "precious").write_text("mine")
    path.symlink_to(tmp_path / "precious")
    evaluate(tiny("steps=1"), SHAPES, tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not path.is_symlink()


def test_no_file_in_a_folder_of_the_evaluation_is_written_through_a_link(tmp_path):
    evaluate(tiny("steps=1"), SHAPES, tmp_path / "out", save_images=True)
    files = [path for name in ("measured", "images") for path in (tmp_path / "out" / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".png", ".jsonl"}
    for number, path in enumerate(files):
        path.unlink()
        (tmp_path / f"precious{number}").write_text("mine")
        path.symlink_to(tmp_path / f"precious{number}")
    evaluate(tiny("steps=1"), SHAPES, tmp_path / "out", save_images=True)
    assert {path.read_text() for path in tmp_path.glob("precious*")} == {"mine"}
    assert not any(path.is_symlink() for path in files)


def test_images_of_fewer_prompts_leave_none_behind(tmp_path):
    for count in (6, 4):
        evaluate(tiny("steps=1"), SHAPES, tmp_path, count=count, save_images=True)
    assert len(list((tmp_path / "images").rglob("*.png"))) == 4


def test_a_figure_that_is_not_finite_has_no_star_and_is_said(tmp_path):
    class Odd(Metric):
        def score(self, batch: ImageBatch) -> Tensor:
            return batch.images.mean((1, 2, 3)).log()  # of 0: minus infinity

    suite = MetricSuite({"m": Odd()})
    samplers = {"a": measured(suite, torch.rand(8, 3, 2, 2)), "b": measured(suite, torch.zeros(8, 3, 2, 2))}
    found = compare(suite, samplers, "a", 10)
    assert found.differences["b"] == {}
    assert found.missing == ["m of b has no interval: it is missing or not finite in some resamples"]


# ---- mistakes


@pytest.fixture
def line(capsys, monkeypatch) -> Callable[[Sequence[str]], str]:
    """`line(arguments)` is the one line that the command ends with; no image is made before it."""
    monkeypatch.setattr(protocol, "compare", lambda *_: pytest.fail("it was evaluated"))
    monkeypatch.setattr(measuring, "generate", lambda *_: pytest.fail("an image was made"))

    def run(arguments: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
        assert len(said) == 1
        return said[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", TINY, "steps=0"], "steps=0"),
        (["--model", TINY, "steps=1,x"], "steps=1,x"),
        (["--model", TINY, "guidance=nan"], "guidance=nan"),
        (["--model", TINY, "nfe=4"], "'nfe=4' must be one of steps=VALUE, guidance=VALUE, shift=VALUE, name=VALUE"),
        (["--model", TINY, TINY], "pass another --model for another folder"),
        (["--model", TINY, "--model", TINY], "give one of them another name with name=NAME"),
        (["--model", TINY, "steps=1,1"], "has 'tiny_sd3 1 step' twice"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--model", TINY, "--baseline", "teacher"], "--baseline 'teacher' must be one of the samplers"),
        (["--model", TINY, "--metric", "fidd"], "--metric fidd must be one of aesthetic, clip_score, cmmd, colour, "),
        (["--model", TINY, "--set", "metric.colour.sampler=absent"], "metric.colour.sampler"),
        (["--model", TINY, "--set", "metric.colour.scale=2"], "metric.colour.scale"),
        (["--model", TINY, "steps=1", "steps=2"], "a setting is given twice"),
        (["--model", TINY, "name=a|b"], "no |"),
        (["--model", TINY, "--set", "trainer.max_steps=3"], "must be an option of a metric"),
        (["--model", TINY, "--set", "~metric.colour"], "no metric is left"),
        (["--model", TINY, "--dtype", "float8"], "--dtype float8"),
        (["--model", TINY, "--count", "1"], "--count"),
        (["--model", TINY, "--resamples", "1"], "--resamples"),
        (["--model", TINY, "--prompts", "no such file"], "no such file"),
        (["--model", TINY, "--metric", "shapes_adherence", "--prompts", "general"], "metric.adherence"),
        (["--model", TINY, "--device", "tpu"], "--device tpu"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, line, tmp_path):
    prompts = [] if "--prompts" in arguments else ["--prompts", "shapes_heldout"]
    assert expected in line([*arguments, *prompts, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_too_few_prompts_name_the_options_of_the_command(line, tmp_path: Path):
    (tmp_path / "one.txt").write_text("a cat\n")
    said = line(["--model", TINY, "--prompts", str(tmp_path / "one.txt")])
    assert "--prompts: there are 1 prompts; give at least 2" in said
    said = line(["--model", TINY, "--prompts", "shapes_heldout", "--count", "6", "--metric", "shapes_diversity"])
    assert "metric.diversity.prompts=32 is more than the 6 prompts" in said
    assert "or raise --count" in said


def test_results_do_not_go_inside_a_model(line, own_model):
    inside = str(own_model / "evaluation")
    assert "lies inside the model" in line(
        ["--model", str(own_model), "--prompts", "shapes_heldout", "--output", inside]
    )


def test_a_folder_that_cannot_be_written_is_found_first(line, tmp_path):
    (tmp_path / "measured").write_text("a file")
    said = line(["--model", TINY, "--prompts", "shapes_heldout", "--output", str(tmp_path)])
    assert "cannot be written" in said


def test_results_do_not_go_into_a_model(line):
    assert "pass a folder outside" in line(["--model", TINY, "--prompts", "shapes_heldout", "--output", TINY])


def test_an_output_that_is_a_file_stays(line, tmp_path: Path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert "is a file; pass a folder" in line(["--model", TINY, "--prompts", "shapes_heldout", "--output", str(file)])
    assert file.read_text() == "mine"


def test_a_name_of_a_bundled_file_or_a_file(tmp_path: Path):
    (tmp_path / "own.txt").write_text("a cat\na dog\n")
    assert read_prompts(str(tmp_path / "own.txt"), 5) == ["a cat", "a dog"]
    assert len(read_prompts("general", 5)) == 5
    with pytest.raises(UserError, match="generall"):
        read_prompts("generall", 5)
