"""How the bundled weights are made: the loop restarts exactly, every stage runs, text folds without loss."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

from cdm_lightning.config import compose
from cdm_lightning.data.shapes import all_words
from cdm_lightning.errors import UserError
from cdm_lightning.metrics.shapes_classifier import ShapesClassifier
from cdm_lightning.pretrain import pretrain
from cdm_lightning.pretraining import prompts
from cdm_lightning.pretraining.loop import Recipe, optimise
from cdm_lightning.pretraining.teacher import TextConditioned, tokenise
from cdm_lightning.pretraining.tiny_sd3 import (
    build_clip,
    build_clip_tokenizer,
    build_pipeline,
    build_t5,
    build_t5_tokenizer,
    start_from,
)

CAPTIONS = ["a large red circle at the top", "a small blue square left of a large green ring", ""]


def test_folded_padding_gives_the_stock_result() -> None:
    pipeline = build_pipeline(seed=3)
    model = TextConditioned(pipeline).eval()
    x, sigma = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        folded = model(x, sigma, *tokenise(pipeline, CAPTIONS, keep=11))
        embeds, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
        pipeline.transformer.set_attn_processor(JointAttnProcessor2_0())
        stock = pipeline.transformer(x, embeds, pooled, sigma * 1000, return_dict=False)[0]
        short = pipeline.transformer(x, embeds[:, :24], pooled, sigma * 1000, return_dict=False)[0]
    assert embeds.shape[1] == 12 + 256
    torch.testing.assert_close(folded, stock, atol=3e-6, rtol=0)
    assert (short - stock).abs().max() > 1e-3  # dropping the padding instead of folding it does change the result


def test_a_longer_caption_is_refused_not_cut() -> None:
    with pytest.raises(ValueError, match="T5 tokens, more than keep=4"):
        tokenise(build_pipeline(), CAPTIONS, keep=4)


def test_going_on_from_an_earlier_pipeline_keeps_what_it_knew(tmp_path: Path) -> None:
    words = [word for word in all_words() if word not in ("cross", "yellow")]  # token numbers differ from ours
    clip, t5 = build_clip_tokenizer(words), build_t5_tokenizer(words)
    earlier = build_pipeline(seed=1)
    earlier.register_modules(
        tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5, text_encoder=build_clip(clip).eval(),
        text_encoder_2=build_clip(clip).eval(), text_encoder_3=build_t5(t5).eval(),
    )  # fmt: skip
    earlier.vae.register_to_config(scaling_factor=1.3, shift_factor=0.2)
    earlier.save_pretrained(tmp_path / "earlier")
    pipeline = build_pipeline(seed=2)
    start_from(pipeline, tmp_path / "earlier")
    prompts = ["a large red circle", "a small white ring"]
    ours, theirs = (
        p.encode_prompt(prompts, None, None, do_classifier_free_guidance=False) for p in (pipeline, earlier)
    )
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[2], theirs[2], atol=1e-5, rtol=0)
    assert len(pipeline.tokenizer_3) > len(t5)
    assert torch.equal(pipeline.transformer.proj_out.weight, earlier.transformer.proj_out.weight)
    assert torch.equal(pipeline.vae.decoder.conv_out.weight, earlier.vae.decoder.conv_out.weight)
    assert (pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor) == (1.3, 0.2)


def test_going_on_from_something_else_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json"):
        start_from(build_pipeline(), tmp_path)
    build_pipeline(heads=2).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="is not a tiny pipeline with the sizes in `pipeline`") as caught:
        start_from(build_pipeline(heads=3), tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_the_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    recipe = Recipe(iterations=100, lr=1.0, warmup=10, decay_from=0.5)
    assert [recipe.lr_at(i) for i in (0, 9, 50)] == [0.1, 1.0, 1.0]
    assert recipe.lr_at(75) == pytest.approx(0.5)
    assert recipe.lr_at(99) == pytest.approx(0.02)


def test_an_interrupted_stage_goes_on_exactly(tmp_path: Path) -> None:
    recipe = Recipe(iterations=10, ema_decay=0.9, seed=5)

    def run(folder: Path, stop_at: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Linear(4, 4)

        def loss(iteration: int, rng: torch.Generator) -> torch.Tensor:
            if iteration == stop_at:
                raise KeyboardInterrupt
            return network(torch.randn(8, 4, generator=rng)).square().mean()

        return optimise("stage", network, loss, recipe, folder=folder, save_every=3, log_every=5)

    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop_at=8)
    resumed = run(tmp_path / "b")
    assert torch.equal(straight.weight, resumed.weight)
    curves = [(tmp_path / name / "stage_loss.csv").read_text() for name in ("a", "b")]
    assert curves[0] == curves[1]
    assert [line.split(",")[0] for line in curves[0].splitlines()] == ["iteration", "5", "10"]


def test_every_stage_runs_and_leaves_loadable_assets(tmp_path: Path) -> None:
    short = [
        f"recipe.{stage}.{key}"
        for stage in ("vae", "teacher", "classifier", "clip")
        for key in ("iterations=2", "batch_size=4")
    ]
    sizes = [
        "teacher.count=32",
        "teacher.compile_network=false",
        "prompts.train=8",
        "prompts.heldout=4",
        "scorer_pool=64",
        "vae_pool=64",
    ]
    cfg = compose(
        [f"output={tmp_path / 'assets'}", f"work_dir={tmp_path / 'work'}", "threads=1", *short, *sizes], "pretrain"
    )
    assets = pretrain(cfg)
    pipeline = StableDiffusion3Pipeline.from_pretrained(assets / "tiny_sd3")
    image = pipeline("a red circle", num_inference_steps=2, guidance_scale=1, output_type="pt").images
    assert image.shape == (1, 3, 32, 32)
    assert torch.isfinite(image).all()
    ShapesClassifier.load(assets / "shapes_classifier.safetensors")
    assert (assets / "tiny_clip" / "open_clip_model.safetensors").is_file()
    assert len((assets / "prompts" / "shapes_train.txt").read_text().splitlines()) == 8
    cfg.merge_with({"earlier": str(assets / "tiny_sd3"), "work_dir": str(tmp_path / "again"), "stages": ["teacher"]})
    further = StableDiffusion3Pipeline.from_pretrained(pretrain(cfg) / "tiny_sd3")
    for name in ("encoder.conv_in.weight", "decoder.conv_out.weight"):  # the codec of the latents that it knows
        assert torch.equal(further.vae.get_parameter(name), pipeline.vae.get_parameter(name))
    assert not torch.equal(further.transformer.proj_out.weight, pipeline.transformer.proj_out.weight)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("stages=[decoder]", "stages.0=decoder must be"),
        ("teacher.count=2.5", "teacher.count=2.5 must be"),
        ("recipe.vae.lr=nan", "recipe.vae.lr=nan must be"),
        ("recipe.clip.betas=[0.9]", "recipe.clip.betas=[0.9] must be"),
        ("teacher.caption_dropout=2", "teacher.caption_dropout=2 must be"),
        ("+pipeline.width=3", "pipeline has no option 'width'"),
        ("threads=0", "threads=0 must be"),
        ("recipe.teacher=null", "recipe.teacher=None must be a mapping"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_stage(tmp_path: Path, monkeypatch, option: str, said: str) -> None:
    monkeypatch.setattr(prompts, "write_prompts", lambda *values, **options: pytest.fail("a stage was begun"))
    with pytest.raises(UserError) as refused:
        pretrain(compose([f"output={tmp_path}/made", f"work_dir={tmp_path}", option], "pretrain"))
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists()
