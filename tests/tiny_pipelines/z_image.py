"""Z-Image; 24 image tokens, which the network pads to 32."""

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from cdm_lightning.backbones.z_image import ZImageBackbone
from tiny_pipelines import parts
from tiny_pipelines.family import SIZES, TinyFamily


def build():
    tokenizer = parts.byte_tokenizer(chat_template=parts.CHAT_TEMPLATE)
    return parts.seeded(
        ZImagePipeline,
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae,
        text_encoder=lambda: Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=0,
            )
        ),
        tokenizer=lambda: tokenizer,
        transformer=lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
    )


FAMILY = TinyFamily(
    name="z_image",
    experiment="z_image_cdm",
    backbone=ZImageBackbone,
    build=build,
    call={"guidance_scale": 0.0},
    guided=lambda scale: {"guidance_scale": scale - 1},
    options=SIZES | {"max_sequence_length": 128},
    packed=False,
)
