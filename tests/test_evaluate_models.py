"""What `evaluate` can measure besides networks of known families: folders of images, other pipelines, with several processes."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from processes import together
from safetensors.torch import load_file
from tiny_pipelines.foreign import pixart, stable_diffusion
from torch import Tensor

from cdm_lightning.backbones.foreign_pipeline import open_foreign
from cdm_lightning.config import asset_path
from cdm_lightning.distributed.ranks import connected
from cdm_lightning.errors import UserError
from cdm_lightning.evaluate import evaluate, read_model, read_prompts
from cdm_lightning.evaluation.given_images import ImagesOfPrompts
from cdm_lightning.evaluation.intervals import affordable, compare
from cdm_lightning.evaluation.measuring import _interleaved, _Share, joined
from cdm_lightning.evaluation.report import markdown_table, table
from cdm_lightning.metrics.base import MeasuredImages, Metric
from cdm_lightning.metrics.suite import Collected, MetricSuite
from cdm_lightning.run.model_words import read_setting

TINY = str(asset_path("tiny_sd3"))
SHAPES = read_prompts("shapes_heldout", 6)
BOTH = ("colour", "shapes_adherence")
DOCS = Path(__file__).parents[1] / "docs"


class Means(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def figures(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("sampler", "network_calls", "seconds_per_image")}


def write_images(folder: Path, names: list[str], side: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (side, side), (number, 0, 0)).save(folder / name)
    return folder


def reds(folder: Path, prompts: list[str]) -> list[int]:
    """The number that each prompt's image has as its colour."""
    images = ImagesOfPrompts(folder)
    images.check([], prompts, MetricSuite())
    made = images.images(None, prompts, range(len(prompts)), 0)
    return (made[:, 0, 0, 0] * 255).round().int().tolist()


# ---- a folder of images


def test_saved_images_have_exactly_the_figures_of_the_model(tmp_path):
    first = evaluate([[TINY, "name=t", "steps=2"]], SHAPES, tmp_path / "a", BOTH, resamples=20, save_images=True)
    folder = next((tmp_path / "a/images").iterdir())
    models = [[TINY, "name=t", "steps=2"], [str(folder), "name=files"], [str(folder.parent), "name=above"]]
    found = evaluate(models, SHAPES, tmp_path / "a", BOTH, resamples=20, save_images=True)
    rows = found.ladder.rows
    assert rows[0] == first.ladder.rows[0]
    assert figures(rows[1]) == figures(rows[2]) == figures(rows[0])
    assert len(figures(rows[0])) == 5
    assert set(rows[1]) == {"sampler", *figures(rows[0])}  # no time, no network calls
    gaps = found.comparison.differences["files"]
    assert {(gap.value, gap.low, gap.high) for gap in gaps.values()} == {(0.0, 0.0, 0.0)}
    assert [text for text in found.cautions if text.startswith("files: its images were made elsewhere")]
    assert found.ladder.settings["notes"].keys() == {"files", "above"}
    ImagesOfPrompts(folder.rename(tmp_path / "renamed")).check([], SHAPES, MetricSuite())


def test_each_image_belongs_to_its_prompt(tmp_path):
    assert reds(write_images(tmp_path / "a", ["b.png", "a.bmp", "c.png"]), SHAPES[:3]) == [1, 0, 2]
    assert reds(
        write_images(tmp_path / "b", ["10.png", "000.png", "9.png", *(f"{n}.png" for n in range(1, 9))]), ["p"] * 11
    )[8:] == [10, 2, 0]
    folder = write_images(tmp_path / "c", ["x.png", "y.png"])
    lines = [{"file": "y.png", "prompt_index": 0, "prompt": SHAPES[0]}, {"file": "x.png", "prompt_index": 1}]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert reds(folder, SHAPES[:2]) == [1, 0]


def damaged(folder: Path) -> None:
    path = folder / "1.png"
    path.write_bytes(path.read_bytes()[:-20])


def bomb(folder: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(folder / "0.png")


def manifest(**changes) -> object:
    def write(folder: Path) -> None:
        lines = [{"file": f"{n}.png", "prompt_index": n} for n in range(3)]
        lines[1] |= changes
        (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))

    return write


WRONG = {
    "one of another size": (
        lambda folder: write_images(folder, ["0.png"], 9),
        "0.png of 9 x 9 and 1.png of 8 x 8 pixels",
    ),
    "too few": (
        lambda folder: (folder / "2.png").unlink(),
        "has 2 images for 3 prompts; expected is one image for each",
    ),
    "too many": (lambda folder: write_images(folder, ["3.png"]), "has 4 images for 3 prompts; expected"),
    "a number is missing": (lambda folder: (folder / "2.png").rename(folder / "7.png"), "no image with the number 2"),
    "cut off": (damaged, "1.png: cannot be read as an image"),
    "a cut JPEG": (lambda folder: Image.new("RGB", (8, 8)).save(folder / "1.png", "TIFF"), None),
    "a bomb": (bomb, "0.png: cannot be read as an image (Image size (400000000 pixels)"),
    "text": (lambda folder: (folder / "2.png").write_text("x"), "2.png: cannot be read as an image"),
    "a manifest of less": (manifest(prompt_index=0), "line 2: prompt 0 has an image already"),
    "of another prompt": (manifest(prompt="a cat"), "line 2: the image was made for 'a cat', but prompt 1 is"),
    "with a file elsewhere": (manifest(file="../0.png"), "line 2: the image '../0.png' is not in the folder"),
    "with a number that is none": (manifest(prompt_index=True), "line 2: prompt_index must be a number from 0"),
    "beyond the prompts": (manifest(prompt_index=3), "line 2: there is no prompt 3, but only 3 prompts"),
}


@pytest.mark.parametrize("what", WRONG)
def test_images_that_do_not_fit_are_refused_before_any_model_is_measured(what, tmp_path, monkeypatch):
    folder, (spoil, said) = write_images(tmp_path / "images", ["0.png", "1.png", "2.png"]), WRONG[what]
    spoil(folder)
    monkeypatch.setattr("cdm_lightning.evaluation.measuring.generate", lambda *_: pytest.fail("a model was measured"))
    if said is None:
        assert reds(folder, SHAPES[:3]) == [0, 0, 2]  # the content of a file counts, not its name
        return
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        evaluate([[TINY, "steps=1"], str(folder)], SHAPES[:3], tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_other_refusals_of_images(tmp_path):
    folder = write_images(tmp_path / "a", [f"img_{n}.png" for n in range(11)])
    with pytest.raises(UserError, match="the order of the names is not certain, because 10 comes before 2"):
        reds(folder, ["p"] * 11)
    with pytest.raises(UserError, match="is a folder of images, which has no steps"):
        read_model([str(folder), "steps=4"])
    with pytest.raises(UserError, match="has one image of each prompt, but a metric needs"):
        ImagesOfPrompts(folder).check([], ["p"] * 11, SimpleNamespace(copies=SimpleNamespace(prompts=2, images=4)))
    for name in "xy":
        write_images(tmp_path / "b" / name, ["0.png"])
        (tmp_path / "b" / name / "manifest.jsonl").write_text('{"file": "0.png", "prompt_index": 0}')
    with pytest.raises(
        UserError, match=r"has the images of 2 samplers; pass one --model for each folder in it, such as .*b/x"
    ):
        reds(tmp_path / "b", ["p"])


def test_a_metric_of_another_size_is_refused_first(tmp_path):
    folder = write_images(tmp_path / "a", ["0.png", "1.png"])
    with pytest.raises(UserError, match=r"metric\.adherence cannot measure images of 8 x 8 pixels"):
        evaluate([[TINY, "steps=1"], str(folder)], SHAPES[:2], tmp_path / "out", BOTH)
    assert not list((tmp_path / "out/measured").iterdir())


def test_images_have_no_second_noise(tmp_path):
    folder = write_images(tmp_path / "a", [f"{n}.png" for n in range(6)], 32)
    options = ["metric.frechet_teacher.sampler=t 1 step"]
    models = [[TINY, "name=t", "steps=1"], [str(folder), "name=files"]]
    found = evaluate(models, SHAPES, tmp_path / "out", ["shapes_frechet_teacher"], options, resamples=20).ladder
    assert set(figures(found.rows[1])) == {"frechet_teacher_other_noise"}  # their noise is not that of the teacher
    assert found.measured["files"].collected.other_noise == {}


def test_other_pixels_under_the_same_names_are_measured_anew(tmp_path):
    folder = write_images(tmp_path / "a", ["0.png", "1.png"])
    before = evaluate([str(folder)], SHAPES[:2], tmp_path / "out").ladder.rows[0]
    Image.new("RGB", (8, 8), "white").save(folder / "1.png")
    after = evaluate([str(folder)], SHAPES[:2], tmp_path / "out").ladder.rows[0]
    assert after["colour_brightness"] > before["colour_brightness"] + 0.4


# ---- pipelines of other families


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("foreign") / "toy_sd", "lcm")


def test_a_foreign_pipeline_is_called_as_it_is_and_the_batch_size_does_not_matter(foreign, tmp_path):
    grid = [str(foreign), "steps=1,3", "guidance=1,4"]
    found = [evaluate([grid], SHAPES, tmp_path / str(n), batch_size=n, save_images=n == 6) for n in (6, 2)]
    first, second = (one.ladder for one in found)
    assert [row["network_calls"] for row in first.rows] == [1, 2, 3, 6]  # counted: two with guidance
    for name, images in first.images.items():
        assert (images - second.images[name]).abs().max() <= 1 / 255
        assert images.std() > 0.01
    assert not torch.equal(first.images["toy_sd 1 step"], first.images["toy_sd 3 steps"])
    generators = [torch.Generator().manual_seed(0)]
    again = open_foreign(str(foreign)).load(torch.device("cpu"), torch.float32)
    alone = again.images(SHAPES[:1], generators, 3, 4.0)
    stock = again.pipeline(
        SHAPES[0], num_inference_steps=3, guidance_scale=4.0, generator=generators[0].manual_seed(0), output_type="pt"
    )
    assert torch.allclose(alone, stock.images, atol=1e-6)
    assert "starts from noise of its own" in found[0].cautions[0]
    assert found[0].ladder.measured["toy_sd 1 step"].collected.has_noise is False


def test_a_pixart_is_measured(tmp_path):
    folder = pixart(tmp_path / "pixart")
    found = evaluate([[str(folder), "steps=2", "guidance=1,3"]], SHAPES[:2], tmp_path / "out", resamples=20)
    assert [row["network_calls"] for row in found.ladder.rows] == [2, 4]
    assert found.ladder.images["pixart 2 steps"].shape == (2, 3, 128, 128)
    assert open_foreign(str(folder)).size == (128, 128)


def test_a_safety_checker_is_reported(tmp_path):
    folder = stable_diffusion(tmp_path / "unsafe", is_safe=False)
    found = evaluate([[str(folder), "steps=2"]], SHAPES, tmp_path / "out", resamples=20)
    assert any("its safety checker is on" in text for text in found.cautions)
    said = "unsafe 2 steps: the safety checker replaced 6 of 6 images by black ones"
    assert said in found.cautions
    assert found.ladder.images["unsafe 2 steps"].max() == 0
    again = evaluate([[str(folder), "steps=2"]], SHAPES, tmp_path / "out", resamples=20)
    assert said in again.cautions  # of the stored measurements


def index(folder: Path, **changes) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ATTACKS = {
    "code of the folder": ({"_class_name": ["pipeline", "MyPipeline"]}, "_class_name must be a string"),
    "no class of diffusers": ({"_class_name": "os"}, "which is no pipeline of diffusers"),
    "the base class": ({"_class_name": "DiffusionPipeline"}, "which is no pipeline of diffusers"),
    "a model": ({"_class_name": "UNet2DConditionModel"}, "which is no pipeline of diffusers"),
    "images from images": (
        {"_class_name": "StableDiffusionImg2ImgPipeline"},
        "does not make images from prompts alone",
    ),
    "a part of the folder": ({"unet": ["my_unet", "UNet"]}, "the class of unet, my_unet.UNet, cannot be loaded"),
    "a class that picks others": (
        {"text_encoder": ["transformers", "AutoModel"]},
        "transformers.AutoModel, is no model",
    ),
    "a function": ({"text_encoder": ["transformers", "pipeline"]}, "transformers.pipeline, is no model"),
    "noise without a seed": ({"scheduler": ["diffusers", "DPMSolverSDEScheduler"]}, "DPMSolverSDEScheduler"),
    "another module": ({"safety_checker": ["stable_diffusion", "Other"]}, "cannot be loaded"),
}


@pytest.mark.parametrize("what", ATTACKS)
def test_only_classes_of_diffusers_and_transformers_are_built(what, foreign, tmp_path, monkeypatch):
    folder, (changes, said) = Path(shutil.copytree(foreign, tmp_path / "x")), ATTACKS[what]
    for name in ("pipeline.py", "my_unet.py", "unet/my_unet.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass UNet: pass\nclass MyPipeline: pass")
    index(folder, **changes)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        read_model([str(folder)]).samplers  # noqa: B018  it opens the model
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "pwned").exists()


def test_weights_that_are_no_safetensors_are_refused(foreign, tmp_path):
    folder = Path(shutil.copytree(foreign, tmp_path / "x"))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"unet has no .*safetensors.*convert its \.bin files"):
        read_model([str(folder)])


def test_settings_that_a_foreign_pipeline_does_not_have(foreign, tmp_path):
    with pytest.raises(UserError, match="the schedule of a StableDiffusionPipeline is its own; leave out shift="):
        evaluate([[str(foreign), "shift=2"]], SHAPES, tmp_path)
    assert read_model([str(foreign)]).samplers[0].nfe == 50  # of the pipeline's own call
    assert open_foreign(str(foreign)).size == (32, 32)
    assert evaluate([[str(foreign), "steps=1", "shift=trained"]], SHAPES, tmp_path).ladder.rows


# ---- several processes


def share(output: str, foreign: str) -> None:
    """One of the processes of an evaluation."""
    torch.set_num_threads(1)
    more = ["metric.diversity.prompts=4", "metric.diversity.images_per_prompt=3"]
    with connected("evaluation"):
        models, metrics = [[TINY, "name=t", "steps=1"], [foreign, "steps=2"]], (*BOTH, "shapes_diversity")
        found = evaluate(models, SHAPES, output, metrics, more, batch_size=2, save_images=True)
        assert [row["sampler"] for row in found.ladder.rows] == ["t 1 step", "toy_sd 2 steps"]


def test_two_processes_give_the_results_of_one_bit_for_bit(foreign, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    together(2, share, (str(two), str(foreign)))
    share(str(one), str(foreign))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".png"]) == 13
    for file in files:
        if file.suffix in (".png", ".jsonl", ".csv") or file.name in ("intervals.json", "differences.md"):
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
        if file.suffix == ".safetensors":
            tensors = load_file(one / file), load_file(two / file)
            assert tensors[0].keys() == tensors[1].keys()
            assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    rows = [json.loads((folder / "metrics.json").read_text())["rows"] for folder in (one, two)]
    assert [figures(row) for row in rows[0]] == [figures(row) for row in rows[1]]
    assert "diversity" in rows[0][0]


def test_shares_are_joined_in_the_order_of_the_batches():
    assert _interleaved([[0, 2, 4], [1, 3]]) == [0, 1, 2, 3, 4]
    shares = []
    for first in (0, 1):
        batches = [torch.arange(2 * n, 2 * n + 2)[:, None] for n in range(first, 4, 2)]
        indices = torch.cat(batches)[:, 0].tolist()
        collected = Collected([str(i) for i in indices], indices, {"f": batches}, {"s": [b[:, 0] for b in batches]})
        collected.other_noise["f"], collected.copies["f"] = batches, batches
        shares.append(_Share([b[..., None, None] for b in batches], collected, 1.5, {"network_calls": 4}))
    found = joined(shares, torch.empty(0, 1, 1, 1), 2)
    order = list(range(8))
    assert found.collected.indices == order
    assert found.collected.prompts == [str(i) for i in order]
    assert found.collected.features["f"][0].flatten().tolist() == order
    assert found.collected.other_noise["f"][0].flatten().tolist() == order
    assert torch.cat(found.collected.copies["f"]).flatten().tolist() == order
    assert found.shown.flatten().tolist() == order
    assert (found.seconds, found.counts) == (3.0, {"network_calls": 8})


# ---- many images


class Wide(Metric):
    features = ("means",)

    def figures(self, measured, others):
        assert set(measured.features) == {"means"}
        return float(measured.features["means"].mean())


def test_resamples_that_would_take_hours_are_fewer_or_none():
    suite = MetricSuite({"m": Wide()}, {"means": Means(), "other": Means()})
    collected = Collected()
    suite.measure(collected, torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(0)), ["p"] * 40, range(40))
    collected.features["other"] = collected.features["means"]
    work = Wide().work(40, 3)
    assert work == 2 * 40 * 9 + 60 * 27
    for room, expected in ((60, 50), (30, 30), (19, 0)):
        found = compare(suite, {"a": collected}, "a", 50, most_work=work * room)
        assert found.reduced == ({"m": 30} if expected == 30 else {})
        assert found.left_out == ([] if expected else ["m"])
    assert affordable(Wide(), {"a": MeasuredImages(["p"], [0], {"means": torch.rand(1, 3)})}, 5) == 5


def test_measurements_in_order_are_not_copied():
    collected = Collected(["a", "b"], [0, 1], {"f": [torch.rand(2, 3)]}, {"m": [torch.rand(2)]})
    measured = collected.of("m")
    assert measured.features["f"].data_ptr() == collected.features["f"][0].data_ptr()
    collected.indices = [1, 0]
    assert torch.equal(collected.of("m").features["f"], collected.features["f"][0].flip(0))


# ---- loose ends


def test_slurm_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UserError, match="start it with torchrun, or as one task"), connected("evaluation"):
        pytest.fail("the block ran")


def test_words_for_the_schedule():
    assert read_setting("m", "shift=trained,uniform,3") == ("shift", (None, 1.0, 3.0))
    with pytest.raises(UserError, match=r"shift=linear: 'linear' must be a number above 0 .*, or trained or uniform"):
        read_setting("m", "shift=linear")
    names = [spec.name for spec in read_model([TINY, "name=t", "steps=1", "shift=trained,uniform"]).samplers]
    assert names == ["t 1 step", "t 1 step, shift 1"]


def test_an_unknown_name_of_prompts_lists_the_names():
    with pytest.raises(
        UserError, match="neither a file nor one of the bundled sets general, shapes_heldout, shapes_train"
    ):
        read_prompts("generel", 4)


def test_a_path_with_a_bar_stays_in_its_cell(tmp_path):
    assert markdown_table([{"sampler": "a|b\\", "x": 1.0}]).splitlines()[2] == r"| a\|b\\ | 1.000 |"
    folder = write_images(tmp_path / "a|b\x1b[2J", ["0.png", "1.png"])
    found = evaluate([str(folder)], SHAPES[:2], tmp_path / "out", resamples=20)
    assert found.ladder.rows[0]["sampler"] == "a|b?[2J"
    assert r"| a\|b?[2J |" in (tmp_path / "out/table.md").read_text()
    assert "20 resamples are few: the ends of the intervals are rough; use 100 or more" in found.cautions


def test_a_table_fits_a_narrow_terminal():
    rows = [
        {"sampler": f"student {n} steps, guidance 1.5, shift 3", **{f"metric_{i}": 1.0 for i in range(9)}}
        for n in (1, 2)
    ]
    wide, narrow = table(rows), table(rows, 60)
    assert max(map(len, wide.splitlines())) > 100
    assert max(map(len, narrow.splitlines())) <= 60
    assert "[2] student 2 steps, guidance 1.5, shift 3" in narrow.splitlines()
    assert [f"metric {i}" in narrow for i in range(9)] == [True] * 9
    assert table(rows, 500) == wide


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (DOCS / "evaluation.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 10
    shutil.copytree(TINY, tmp_path / "my_student")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("count=64", "count=4"), "evaluation.md", "exec"), {})
    assert (tmp_path / "outputs/my_evaluation/table.md").is_file()
