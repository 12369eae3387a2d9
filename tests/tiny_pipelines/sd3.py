"""Stable Diffusion 3 and 3.5 through the builder of the bundled pipeline, which differ in their attention."""

from functools import partial

import torch
from diffusers import SD3Transformer2DModel

from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.pretraining.tiny_sd3 import build_pipeline
from tiny_pipelines.family import SIZES, TinyFamily


def build(**attention):
    pipeline = build_pipeline(seed=0, heads=1, layers=2)
    pipeline.vae.register_to_config(scaling_factor=1.3, shift_factor=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {**pipeline.transformer.config, **attention}
        pipeline.transformer = SD3Transformer2DModel.from_config(config).eval().requires_grad_(False)
    return pipeline


def family(name: str, **attention) -> TinyFamily:
    return TinyFamily(
        name=name,
        experiment=f"{name}_cdm",
        backbone=SD3Backbone,
        build=partial(build, **attention),
        call={"guidance_scale": 1.0},
        guided=lambda scale: {"guidance_scale": scale},
        options=SIZES | {"max_sequence_length": 24},
        packed=False,
        # the last block drops its text stream after attention, whose queries and output therefore have no effect
        silent=r"transformer_blocks\.1\.attn\..*add",
    )


MEDIUM = family("sd3", qk_norm=None)
LARGE_35 = family("sd35_large", qk_norm="rms_norm")
MEDIUM_35 = family("sd35_medium", qk_norm="rms_norm", dual_attention_layers=(0,))  # a second one, of the image alone
