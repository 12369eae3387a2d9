"""Save memory in the frozen parts of a pipeline, which are the image codec and the text encoders."""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

TILE_OVERLAP = 0.25  # the share of a tile that overlaps its neighbour, as by default in diffusers


def modules_of(pipeline: Any) -> list[nn.Module]:
    """Return the networks among the parts of a pipeline of diffusers."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def decode_sparingly(vae: Any, tile: int | None = None) -> None:
    """Let the image codec `vae` process one image at a time, and large images in tiles. This saves memory.

    An image is decoded in tiles if one of its sides is longer than `tile` pixels (None: never). Tiles overlap and are blended,
    so pixels near their edges change a little. Processing one image at a time changes only the rounding.
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
    """Return an object with two attributes: `vae`, a pipeline's image codec on the meta device, and `image_processor`.

    With this object, the planner measures the memory of decoding without loading weights. `config` holds the arguments
    of the codec's constructor. `factor` is the number of pixels per latent position along one side.
    """
    kind: Any = inspect.signature(pipeline_class.__init__).parameters["vae"].annotation
    with torch.device("meta"):
        vae = kind(**config).eval().requires_grad_(False)
    return SimpleNamespace(vae=vae, image_processor=VaeImageProcessor(vae_scale_factor=factor))


def keep_last_state_only(encoder: nn.Module) -> None:
    """Change a vision-language model in place so that it computes only its last hidden state.

    Pipelines ask for all hidden states and use only the last one. Without the change, the states of all layers would
    stay in memory, and the language head would compute logits over the whole vocabulary (18 GB for 64 prompts of 512
    tokens). The head is removed, and so is the vision tower, which text does not use.
    """
    model = cast(Any, encoder).model

    def forward(*args: Any, output_hidden_states: bool = True, **kwargs: Any) -> BaseModelOutput:
        last = model(*args, **kwargs, output_hidden_states=False, use_cache=False).last_hidden_state
        return BaseModelOutput(last_hidden_state=last, hidden_states=(last,))

    encoder.lm_head = nn.Identity()
    model.visual = None
    encoder.forward = forward
