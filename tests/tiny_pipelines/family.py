"""What the conformance suite has to know about a family besides its backbone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone

HEIGHT, WIDTH = 32, 48  # pixels: not square, so that a mix-up of both shows
SIZES = {"height": HEIGHT, "width": WIDTH}


def plain_round_trip(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] through an `AutoencoderKL`, without scaling."""
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample


@dataclass(frozen=True)
class TinyFamily:
    """`name` is the option of conf/backbone, `experiment` that of conf/experiment; `build` makes the pipeline.

    `options` are arguments of the backbone and of the stock call alike. `call` makes the stock pipeline call its network
    once a step, `guided` gives the arguments for a guidance scale in our sense (1: none). `packed`: the pipeline holds
    latents packed. `silent` matches the weights that do not reach the output. `prepare` puts the stock pipeline into the
    state in which it is compared.
    """

    name: str
    experiment: str
    backbone: type[PipelineBackbone]
    build: Callable[[], DiffusionPipeline]
    call: Mapping[str, Any]
    guided: Callable[[float], Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: dict(SIZES))
    packed: bool = True
    silent: str = "(?!)"
    round_trip: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = plain_round_trip
    prepare: Callable[[DiffusionPipeline], None] = lambda pipeline: None
