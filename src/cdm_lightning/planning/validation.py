"""The memory of validation: images are sampled by a network and decoded by the image codec, which the planner runs without contents."""

import inspect
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.frozen_parts import decode_sparingly
from cdm_lightning.module import CDMModule
from cdm_lightning.planning.live import LiveBytes, storages
from cdm_lightning.planning.memory import Validation
from cdm_lightning.planning.skeleton import to_mode


def trace_validation(module: CDMModule, codec_parameters: int, batch: int | None) -> Validation | None:
    """Return what the samplers of `module` take in validation with batches of `batch` prompts (None: as many as in training).

    The module's backbone must be hollow. None if there is no sampler, and if the shipped configuration does not describe the
    image codec completely, which shows in its number of parameters.
    """
    backbone = cast(PipelineBackbone, module.backbone)
    if not module.samplers:
        return None
    kind: Any = inspect.signature(backbone.pipeline_class.__init__).parameters["vae"].annotation
    with torch.device("meta"):
        vae = kind(**backbone.vae_config).eval().requires_grad_(False)
    if sum(parameter.numel() for parameter in vae.parameters()) != codec_parameters:
        return None
    decode_sparingly(vae, module.compute.decode_tile)
    mode = FakeTensorMode()
    to_mode([vae], mode)
    backbone._codec = SimpleNamespace(vae=vae, image_processor=SimpleNamespace(postprocess=_to_images))
    sizes = [backbone.at(spec.height, spec.width) for spec in module.samplers]
    largest = max(sizes, key=lambda sized: sized.image_size[0] * sized.image_size[1])
    one, two = (_decoded(largest, mode, count) for count in (1, 2))
    guided = max(spec.network_calls / spec.nfe for spec in module.samplers)
    return Validation(one, two - one, guided / len(module.groups.of(0)), batch)


def _to_images(pixels: Tensor, output_type: str) -> Tensor:
    """Do what the image processors of all pipelines do: bring pixels from [-1, 1] to [0, 1]."""
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def _decoded(backbone: PipelineBackbone, mode: FakeTensorMode, count: int) -> float:
    """Return the peak bytes of decoding `count` images, with the images."""
    with mode:
        latents = torch.empty(count, *backbone.latent_shape)
    with mode, LiveBytes(storages(backbone._codec.vae)) as live:
        backbone.decode_latents(latents)
    return live.timeline.peak(0)
