"""The sampling command: the pictures are those of the pipeline, and depend on the seed and the prompt's number only."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from cdm_lightning import export, sample
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.backbones.vocabulary import known_words, unknown_words
from cdm_lightning.config import asset_path
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.distributed.devices import choose_device
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation import pictures

PROMPTS = ["a large red circle", "a small blue square above a green ring", "a ring"]


@pytest.fixture(scope="module")
def exported(tiny_pipeline_folder, tmp_path_factory) -> Path:
    """An export for 2 steps in a size and a text length of its own."""
    backbone = SD3Backbone(str(tiny_pipeline_folder), height=16, width=24, max_sequence_length=40)
    folder = tmp_path_factory.mktemp("export") / "student"
    return export.export_pipeline(backbone, backbone.build_network(), folder, nfe=2)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_an_exported_folder_gives_the_images_of_the_plain_call(exported):
    made = sample.sample_images(str(exported), PROMPTS, seed=3)
    assert made.steps == 2
    pipeline = StableDiffusion3Pipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # as `sample` decodes; a whole batch is rounded differently
    noise = evaluation_noise(3, range(3), (4, 8, 12), "cpu")
    options = {"height": 16, "width": 24, "max_sequence_length": 40}
    theirs = pipeline(
        PROMPTS, num_inference_steps=2, guidance_scale=0, latents=noise, output_type="pt", **options
    ).images
    torch.testing.assert_close(made.images, theirs, rtol=0, atol=1e-4)  # its scheduler computes in float64


def test_images_depend_on_seed_and_prompt_number_only(tiny_pipeline_folder):
    model = str(tiny_pipeline_folder)
    whole = sample.sample_images(model, PROMPTS, steps=2, batch_size=3).images
    torch.testing.assert_close(sample.sample_images(model, PROMPTS, steps=2, batch_size=2).images, whole)
    torch.testing.assert_close(sample.sample_images(model, PROMPTS[:1], steps=2).images, whole[:1])
    assert not torch.allclose(sample.sample_images(model, PROMPTS, steps=2, seed=1).images, whole)


def test_guidance_up_to_one_is_none(tiny_pipeline_folder):
    model = str(tiny_pipeline_folder)
    plain, zero, guided = (
        sample.sample_images(model, PROMPTS, steps=1, guidance_scale=g).images for g in (1.0, 0.0, 4.0)
    )
    assert torch.equal(plain, zero)
    assert not torch.allclose(plain, guided)


def test_a_pipeline_that_is_no_export_takes_the_stock_number_of_steps(tiny_pipeline_folder):
    assert sample.sample_images(str(tiny_pipeline_folder), PROMPTS[:1]).steps == 28


def test_the_command_writes_a_labelled_grid_and_says_where(exported, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a green ring\n\na blue star\n", encoding="utf-8")
    output = tmp_path / "deep" / "grid.png"
    sample.main(
        ["--model", str(exported), "--prompt", "a red circle", "--prompts-file", str(file), "--output", str(output)]
    )
    assert capsys.readouterr().out == f"picture: {output}\n"
    assert [path.name for path in output.parent.iterdir()] == ["grid.png"]
    images = sample.sample_images(str(exported), ["a red circle", "a green ring", "a blue star"]).images
    grid, scale = pixels(output), 7  # 24 pixels are widened to 168
    for i, image in enumerate(images):
        left, top = pictures.GAP + i * (24 * scale + pictures.GAP), 2 * pictures.LABEL_LINE
        tile = grid[top : top + 16 * scale : scale, left : left + 24 * scale : scale]
        assert np.array_equal(tile, (image * 255).round().byte().permute(1, 2, 0).numpy())
        below = grid[top + 16 * scale :, left : left + 24 * scale]
        assert (below < 128).any()  # the prompt's letters


def test_grid_breaks_into_rows():
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    grid = pictures.draw_grid(images, ["a prompt"] * 8, "title")
    tile = 160
    assert grid.width == 6 * (tile + pictures.GAP) + pictures.GAP
    assert (
        grid.height == 2 * (tile + pictures.LABEL_LINES * pictures.LABEL_LINE + pictures.GAP) + 2 * pictures.LABEL_LINE
    )
    assert np.asarray(grid)[:, -tile:][-tile:].min() == 255  # row 2 has two pictures only


def test_help_does_not_wait_for_torch():
    start = time.perf_counter()
    for module in ("sample", "export"):
        command = [sys.executable, "-X", "importtime", "-m", f"cdm_lightning.{module}", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "usage: python -m cdm_lightning." in done.stdout
        assert " torch\n" not in done.stderr
    assert time.perf_counter() - start < 10


# ---- what is refused, in one line


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        sample.main(list(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_mistakes(capsys, tmp_path, tiny_pipeline_folder):
    model = str(tiny_pipeline_folder)
    assert "no prompt" in refusal(capsys, "--model", model)
    assert "missing.txt" in refusal(capsys, "--model", model, "--prompts-file", str(tmp_path / "missing.txt"))
    assert "is a folder" in refusal(capsys, "--model", model, "--prompt", "x", "--output", str(tmp_path))
    assert "--steps: '0' must be a whole number of at least 1" in refusal(
        capsys, "--model", model, "--prompt", "x", "--steps", "0"
    )
    assert "has no model_index.json" in refusal(capsys, "--model", str(tmp_path), "--prompt", "x")
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "grid.png")
    line = refusal(capsys, "--model", model, "--prompt", "x", "--steps", "1", "--output", nowhere)
    assert "the picture cannot be written" in line


@pytest.mark.parametrize("device", ["gpu", "meta", "meta:x", "cuda:77", "hpu", "xla", "cuda:99999999999", "torch"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=f"--device {device} cannot be used here"):
        choose_device(device)
    assert choose_device("cpu").type == "cpu"


def test_words_that_a_toy_model_does_not_know_are_named(tmp_path, capsys):
    tiny = asset_path("tiny_sd3")
    prompts = ["--prompt", "a large red Zebra at the top", "--prompt", "a pink circle"]
    sample.main(["--model", str(tiny), *prompts, "--steps", "1", "--output", str(tmp_path / "a.png")])
    warning = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING"))
    assert warning.startswith("WARNING: pink, zebra are not words that this model knows; it knows ")
    assert {"circle", "large", "red", "top"} <= set(warning.rpartition("knows ")[2].split(", "))
    sample.main(["--model", str(tiny), "--prompt", "a red circle", "--steps", "1", "--output", str(tmp_path / "a.png")])
    assert "WARNING" not in capsys.readouterr().err
    assert unknown_words(["any word"], known_words(tmp_path)) == []  # no tokenizer, or one of usual size
