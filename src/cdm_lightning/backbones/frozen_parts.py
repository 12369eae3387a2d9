"""Saving memory in the frozen parts of a pipeline, its image codec and text encoders: they compute only what is used."""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

TILE_OVERLAP = 0.25  # the share of a tile that overlaps its neighbour, as by default in diffusers


def decode_sparingly(vae: Any, tile: int | None = None) -> None:
    """Let the image codec `vae` work on one image at a time, and on one tile at a time if a side exceeds `tile` pixels.

    Memory is then needed for one image, or one tile (None: no tiles). One image at a time changes pixels by rounding only;
    tiles overlap and are blended, so pixels near their edges differ a little.
    """
    vae.enable_slicing()
    if tile is None:
        vae.disable_tiling()
    elif "tile_sample_min_height" in inspect.signature(vae.enable_tiling).parameters:
        stride = int(tile * (1 - TILE_OVERLAP))
        vae.enable_tiling(tile, tile, stride, stride)
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size = tile
        vae.tile_latent_min_size = tile // 2 ** (len(vae.config.block_out_channels) - 1)


def codec_without_weights(pipeline_class: Any, config: Mapping[str, Any], factor: int) -> Any:
    """Return an object with the image codec of a pipeline class on the meta device (`vae`) and an `image_processor`.

    The planner uses it to measure decoding without weights. `config` has the arguments of the codec's constructor; one
    latent is `factor` x `factor` pixels.
    """
    kind: Any = inspect.signature(pipeline_class.__init__).parameters["vae"].annotation
    with torch.device("meta"):
        vae = kind(**config).eval().requires_grad_(False)
    return SimpleNamespace(vae=vae, image_processor=VaeImageProcessor(vae_scale_factor=factor))


def keep_last_state_only(encoder: nn.Module) -> None:
    """Change a vision-language model with a language head, in place, to return only its last hidden state.

    Pipelines ask for all hidden states and use the last one. The head would compute logits over the whole vocabulary, and the
    states of all layers would stay in memory: 18 GB for 64 prompts of 512 tokens. The head and the vision tower, which text
    never reaches, are dropped.
    """
    model = cast(Any, encoder).model

    def forward(*args: Any, output_hidden_states: bool = True, **kwargs: Any) -> BaseModelOutput:
        last = model(*args, **kwargs, output_hidden_states=False, use_cache=False).last_hidden_state
        return BaseModelOutput(last_hidden_state=last, hidden_states=(last,))

    encoder.lm_head = nn.Identity()
    model.visual = None
    encoder.forward = forward
