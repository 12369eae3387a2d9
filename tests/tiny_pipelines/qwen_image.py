"""Qwen-Image, with a terminal sigma and a codec of videos."""

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from cdm_lightning.backbones.qwen_image import QwenImageBackbone
from tiny_pipelines import parts
from tiny_pipelines.family import SIZES, TinyFamily


def build():
    tokenizer = parts.byte_tokenizer()
    return parts.seeded(
        QwenImagePipeline,
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=lambda: AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 2.0, 0.9],
        ),
        text_encoder=lambda: parts.qwen_vl(tokenizer),
        tokenizer=lambda: tokenizer,
        transformer=lambda: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    )


FAMILY = TinyFamily(
    name="qwen_image",
    experiment="qwen_image_cdm",
    backbone=QwenImageBackbone,
    build=build,
    call={"true_cfg_scale": 1.0},
    guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", "", ""]},
    options=SIZES | {"max_sequence_length": 300},  # bytes: the template alone has 180
    # the last block's text stream is dropped: its queries, its output and its feed-forward layer have no effect
    silent=r"transformer_blocks\.1\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)",
    round_trip=lambda vae, pixels: vae.decode(vae.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0],
)
