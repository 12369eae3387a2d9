"""FLUX.1-dev, which is told a guidance and shifts by image size, and FLUX.1-schnell, which does neither."""

from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from cdm_lightning.backbones.flux import FluxBackbone
from cdm_lightning.data.shapes import all_words
from cdm_lightning.pretraining.tiny_sd3 import CLIP_TOKENS, T5_WIDTH, build_clip_tokenizer, build_t5, build_t5_tokenizer
from tiny_pipelines import parts
from tiny_pipelines.family import SIZES, TinyFamily


def build(is_dev: bool):
    clip, t5 = build_clip_tokenizer(all_words()), build_t5_tokenizer(all_words())
    return parts.seeded(
        FluxPipeline,
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=is_dev),
        vae=parts.vae,
        text_encoder=lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=CLIP_TOKENS,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        ),
        tokenizer=lambda: clip,
        text_encoder_2=lambda: build_t5(t5),
        tokenizer_2=lambda: t5,
        transformer=lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=32,
            guidance_embeds=is_dev,
            axes_dims_rope=(4, 6, 6),
        ),
    )


DEV = TinyFamily(
    name="flux_dev",
    experiment="flux_dev_cdm",
    backbone=FluxBackbone,
    build=partial(build, is_dev=True),
    call={"guidance_scale": 3.5},
    guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", "", ""]},
    options=SIZES | {"max_sequence_length": 24},
)
SCHNELL = TinyFamily(
    name="flux_schnell",
    experiment="flux_schnell_cdm",
    backbone=FluxBackbone,
    build=partial(build, is_dev=False),
    call={},
    options=SIZES | {"max_sequence_length": 24},
)
