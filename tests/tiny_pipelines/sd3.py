"""Stable Diffusion 3 through the builder of the bundled pipeline."""

from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.pretraining.tiny_sd3 import build_pipeline
from tiny_pipelines.family import SIZES, TinyFamily


def build():
    pipeline = build_pipeline(seed=0, heads=1, layers=2)
    pipeline.vae.register_to_config(scaling_factor=1.3, shift_factor=0.2)
    return pipeline


FAMILY = TinyFamily(
    name="sd3",
    experiment="sd3_cdm",
    backbone=SD3Backbone,
    build=build,
    call={"guidance_scale": 1.0},
    guided=lambda scale: {"guidance_scale": scale},
    options=SIZES | {"max_sequence_length": 24},
    packed=False,
    # the last block drops its text stream after attention, whose queries and output therefore have no effect
    silent=r"transformer_blocks\.1\.attn\..*add",
)
