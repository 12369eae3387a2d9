"""LongCat-Image: a joint block and a single one, 16 latent channels as the pipeline writes them down."""

from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from cdm_lightning.backbones.longcat import LongCatBackbone
from tiny_pipelines import parts
from tiny_pipelines.family import TinyFamily


def build():
    tokenizer = parts.byte_tokenizer()
    return parts.seeded(
        LongCatImagePipeline,
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=lambda: parts.vae(latent_channels=16),
        text_encoder=lambda: parts.qwen_vl(tokenizer),
        tokenizer=lambda: tokenizer,
        text_processor=lambda: Qwen2VLProcessor(
            Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=parts.CHAT_TEMPLATE
        ),
        transformer=lambda: LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 6, 6],
        ),
    )


FAMILY = TinyFamily(
    name="longcat",
    experiment="longcat_cdm",
    backbone=LongCatBackbone,
    build=build,
    call={"guidance_scale": 1.0, "enable_prompt_rewrite": False},
    guided=lambda scale: {"guidance_scale": scale},
)
