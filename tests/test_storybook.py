"""The storybook pipeline: SD3's own classes at the sizes of its card, and each stage of its making."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from cdm_lightning.config import compose
from cdm_lightning.data.scenes.grammar import all_words, draw_captions
from cdm_lightning.errors import UserError
from cdm_lightning.metrics.scenes_judge import ScenesJudge
from cdm_lightning.pretrain import check_options, pretrain
from cdm_lightning.pretraining.storybook import CLIP_TOKENS, build_storybook
from cdm_lightning.pretraining.teacher import tokenise

LONGEST = "under the sea a small orange butterfly in front of a large purple mushroom"
MOST_BYTES = 30_000_000


def short(tmp_path: Path, *more: str) -> list[str]:
    """The overrides of a run of all stages in seconds."""
    recipes = [
        f"recipe.{stage}.{key}" for stage in ("judge", "vae", "teacher") for key in ("iterations=2", "batch_size=4")
    ]
    sizes = ["prompts.train=8", "prompts.heldout=4", "teacher.count=16", "teacher.compile_network=false"]
    sizes += ["measured=16", "vae.standardised_on=16"]
    folders = [f"output={tmp_path / 'assets'}", f"work_dir={tmp_path / 'work'}", "threads=1"]
    return ["experiment=storybook_teacher", *folders, *recipes, *sizes, *more]


def test_each_word_is_one_token_and_the_longest_caption_fits() -> None:
    pipeline = build_storybook(heads=1, layers=1)
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_3):
        assert all(len(tokenizer.tokenize(word)) == 1 for word in all_words())
    assert pipeline.tokenizer_max_length == CLIP_TOKENS == len(LONGEST.split()) + 2
    captions = [*draw_captions(2000, 0, "all", pairs=1.0), LONGEST]
    clip, t5 = tokenise(pipeline, captions, keep=15)
    assert clip.shape == (2001, 16)
    assert t5.shape == (2001, 16)
    with pytest.raises(ValueError, match="raise keep"):
        tokenise(pipeline, captions, keep=14)


def test_every_stage_runs_and_diffusers_loads_the_result(tmp_path: Path) -> None:
    assets = pretrain(compose(short(tmp_path), "pretrain"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(assets / "storybook_sd3")
    assert isinstance(pipeline.transformer, SD3Transformer2DModel)
    assert isinstance(pipeline.text_encoder, CLIPTextModelWithProjection)
    assert isinstance(pipeline.text_encoder_3, T5EncoderModel)
    vae = pipeline.vae
    assert isinstance(vae, AutoencoderKL)
    latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 16, 8, 8)
    assert pipeline.transformer.config["patch_size"] == 2
    assert vae.config["scaling_factor"] != 1.0
    picture = pipeline(LONGEST, num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)
    assert torch.isfinite(picture).all()
    files = [*(assets / "storybook_sd3").rglob("*.safetensors"), assets / "scenes_judge.safetensors"]
    assert len(files) == 6
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    ScenesJudge.load(assets / "scenes_judge.safetensors")
    assert set(json.loads((assets / "storybook_vae.json").read_text())) == {"psnr", "judged_right"}
    judged = json.loads((assets / "storybook_judge.json").read_text())
    assert {"single/place", "single/all", "pair/noun_1", "pair/all"} < set(judged)
    assert "pair/place" not in judged
    assert len((assets / "prompts" / "scenes_heldout.txt").read_text().splitlines()) == 4


def test_finished_stages_and_latents_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["stages=[vae,teacher]", "pipeline.heads=1", "pipeline.layers=1"]
    pretrain(compose(short(tmp_path, *small), "pretrain"))
    network = torch.load(tmp_path / "work" / "teacher.pt", weights_only=True)["ema"]

    def refuse(*_: object) -> None:
        raise AssertionError("latents were encoded again")

    monkeypatch.setattr("cdm_lightning.pretraining.storybook.encode_drawings", refuse)
    pretrain(compose(short(tmp_path, *small), "pretrain"))
    again = torch.load(tmp_path / "work" / "teacher.pt", weights_only=True)["ema"]
    assert all(torch.equal(a, b) for a, b in zip(network, again, strict=True))
    pretrain(compose(short(tmp_path, *small, "recipe.teacher.iterations=3"), "pretrain"))
    more = torch.load(tmp_path / "work" / "teacher.pt", weights_only=True)
    assert more["iteration"] == 3
    assert not all(torch.equal(a, b) for a, b in zip(network, more["ema"], strict=True))


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("stages=[clip]", "stages.0=clip must be"),
        ("bundle=flux", "bundle=flux must be"),
        ("+scorer_pool=4", "scorer_pool is no option of pretrain"),
        ("vae.kl_weight=-1", "vae.kl_weight=-1 must be"),
        ("judge.pairs=2", "judge.pairs=2 must be"),
        ("recipe.judge.lr=nan", "recipe.judge.lr=nan must be"),
    ],
)
def test_mistakes_are_one_line_before_any_work(option: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        check_options(compose(["experiment=storybook_teacher", option], "pretrain"))
    assert "\n" not in str(caught.value)
