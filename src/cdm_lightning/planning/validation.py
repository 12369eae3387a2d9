"""Measure the memory of validation by decoding images with an image codec that has shapes but no contents."""

from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.frozen_parts import codec_without_weights, decode_sparingly
from cdm_lightning.module import CDMModule
from cdm_lightning.planning.live import LiveBytes, storages
from cdm_lightning.planning.memory import Validation
from cdm_lightning.planning.skeleton import to_mode


def trace_validation(module: CDMModule, codec_parameters: int, batch: int | None) -> Validation | None:
    """Return the memory of validation with batches of `batch` prompts (None: as many as in training).

    `skeleton.hollow` must have been called on the backbone of `module` before. `codec_parameters` is the number of
    parameters of the pipeline's image codec. Returns None if validation has no sampler. Also returns None if the codec
    that the function builds from `backbone.vae_config` has another number of parameters, because its memory would be
    wrong.
    """
    backbone = cast(PipelineBackbone, module.backbone)
    if not module.samplers:
        return None
    codec = codec_without_weights(backbone.pipeline_class, backbone.vae_config, backbone.vae_factor)
    if sum(parameter.numel() for parameter in codec.vae.parameters()) != codec_parameters:
        return None
    decode_sparingly(codec.vae, module.compute.decode_tile)
    mode = FakeTensorMode()
    to_mode([codec.vae], mode)
    backbone._codec = codec
    sizes = [backbone.at(spec.height, spec.width) for spec in module.samplers]
    largest = max(sizes, key=lambda sized: sized.image_size[0] * sized.image_size[1])
    one, two = (_decoded(largest, mode, count) for count in (1, 2))
    guided = max(spec.network_calls / spec.nfe for spec in module.samplers)
    share = guided / len(module.groups.of(0))
    return Validation(one, two - one, _copies(largest, mode), share, batch)


def _decoded(backbone: PipelineBackbone, mode: FakeTensorMode, count: int) -> float:
    """Return the peak bytes of decoding `count` images, including the images."""
    with mode:
        latents = torch.empty(count, *backbone.latent_shape)
    with mode, LiveBytes(storages(backbone._codec.vae)) as live:
        backbone.decode_latents(latents)
    return live.timeline.peak(0)


def _copies(backbone: PipelineBackbone, mode: FakeTensorMode) -> float:
    """Return the peak bytes for each image when the decoded pixels are brought to [0, 1]."""
    count = 16
    with mode, LiveBytes() as live:
        backbone._codec.image_processor.postprocess(torch.empty(count, 3, *backbone.image_size), output_type="pt")
    return live.timeline.peak(0) / count
