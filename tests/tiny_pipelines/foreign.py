"""Text-to-image pipelines of families without a backbone, at toy size and with made-up weights."""

from functools import partial
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5EncoderModel,
)

from cdm_lightning.config import asset_path
from tiny_pipelines.parts import seeded

TINY = Path(asset_path("tiny_sd3"))


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    )


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TINY / "tokenizer")


def text_encoder() -> CLIPTextModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer().bos_token_id, "eos_token_id": tokenizer().eos_token_id}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer()), max_position_embeddings=77, **sizes, **ids))


def safety_checker() -> StableDiffusionSafetyChecker:
    """One that flags no image or all: its thresholds are 1, and a test may lower them."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "patch_size": 16,
    }
    made = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision | {"image_size": 32}, projection_dim=8))
    for weights in (made.concept_embeds_weights, made.special_care_embeds_weights):
        weights.data.fill_(-2.0)  # below every cosine: all images are flagged
    return made


def pixart(folder: Path) -> Path:
    """Write a `PixArtAlphaPipeline` of 128 x 128 pixels into `folder`."""
    transformer = partial(
        PixArtTransformer2DModel,
        sample_size=32,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=T5EncoderModel.from_pretrained(TINY / "text_encoder_3").config.d_model,
        norm_num_groups=4,
    )
    seeded(
        PixArtAlphaPipeline,
        transformer=transformer,
        vae=vae,
        scheduler=DPMSolverMultistepScheduler,
        text_encoder=lambda: T5EncoderModel.from_pretrained(TINY / "text_encoder_3"),
        tokenizer=lambda: AutoTokenizer.from_pretrained(TINY / "tokenizer_3"),
    ).save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path, scheduler: str = "ddim", is_safe: bool = True) -> Path:
    """Write a `StableDiffusionPipeline` of 32 x 32 pixels into `folder`, with a safety checker unless `is_safe`."""
    schedules = {"ddim": DDIMScheduler, "lcm": LCMScheduler}
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    parts["scheduler"] = lambda: schedules[scheduler](beta_schedule="scaled_linear")
    parts["safety_checker"] = (lambda: None) if is_safe else safety_checker
    parts["feature_extractor"] = (
        (lambda: None)
        if is_safe
        else (lambda: CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))
    )
    seeded(StableDiffusionPipeline, **parts).save_pretrained(folder)
    return folder
