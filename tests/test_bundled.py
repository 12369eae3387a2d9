"""What the package bundles: small enough, loadable by the stock libraries, and good for what it is there for."""

from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.config import asset_path
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.data.prompts import PromptFile
from cdm_lightning.data.shapes import draw_scenes, render
from cdm_lightning.evaluation.samplers import SamplerSpec, generate
from cdm_lightning.metrics.shapes_classifier import ShapesClassifier

LARGEST = 12 * 2**20  # bytes


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(asset_path("tiny_sd3"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_assets_are_small_and_safe() -> None:
    files = [file for file in Path(asset_path("")).rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= LARGEST
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md", ".jinja", ".css", ".js"}


def test_diffusers_itself_draws_what_the_caption_says(pipeline: StableDiffusion3Pipeline) -> None:
    prompts = [
        "a large red circle at the top",
        "a small white cross on the left",
        "a large green square",
        "a blue ring",
    ]
    noise = evaluation_noise(3, range(4), (4, 16, 16), "cpu")
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=2.0, latents=noise, output_type="pt").images
    judge = ShapesClassifier.load(asset_path("shapes_classifier.safetensors"))
    assert judge.adherence(images.float(), prompts).sum() >= 3


def test_our_sampler_draws_the_same_and_follows_held_out_captions() -> None:
    backbone = SD3Backbone(asset_path("tiny_sd3"), compact_text=11)
    backbone.setup(torch.device("cpu"))
    file = PromptFile(asset_path("prompts/shapes_heldout.txt"))
    prompts = [file[i] for i in range(64)]
    spec = SamplerSpec("teacher", "teacher", 12, 2.0)
    images = generate(backbone, backbone.build_teacher(), spec, prompts, range(64), seed=0, batch_size=64)
    judge = ShapesClassifier.load(asset_path("shapes_classifier.safetensors"))
    assert judge.adherence(images, prompts).float().mean() >= 0.9
    assert judge.adherence(images.flip(0), prompts).float().mean() <= 0.3


def test_the_autoencoder_keeps_renderings(pipeline: StableDiffusion3Pipeline) -> None:
    backbone = SD3Backbone(asset_path("tiny_sd3"), compact_text=11)
    backbone.setup(torch.device("cpu"))
    images = render(draw_scenes(64, seed=21, split="heldout"), seed=22)
    latents = backbone.encode_images(images)
    assert abs(latents.mean()) < 0.2
    assert 0.8 < latents.std() < 1.2
    assert (backbone.decode_latents(latents) - images).square().mean() < 1e-3  # 30 dB


def test_the_tiny_clip_tells_captions_apart() -> None:
    name = f"local-dir:{asset_path('tiny_clip')}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    captions = ["a large red circle at the top", "a small blue ring at the bottom", "a large white cross on the left"]
    from cdm_lightning.data.shapes import parse_caption

    images = torch.cat([render([parse_caption(caption)] * 8, seed=5) for caption in captions])
    with torch.no_grad():
        seen = model.eval().encode_image(images * 2 - 1, normalize=True)
        said = model.encode_text(tokenizer(captions), normalize=True)
    assert ((seen @ said.T).argmax(1) == torch.arange(3).repeat_interleave(8)).float().mean() > 0.9
