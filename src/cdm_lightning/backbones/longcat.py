"""The backbone for LongCat-Image (`LongCatImagePipeline` of diffusers).

Shapes: B batch, (C, h, w) latent, 512 text tokens of Qwen2.5-VL, D their width. As in the pipeline, the network attends to
padding tokens. Prompts are used unchanged: the pipeline's rewriting by a language model is always off.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel
from diffusers.models.transformers.transformer_longcat_image import (
    LongCatImageSingleTransformerBlock,
    LongCatImageTransformerBlock,
)
from torch import Tensor, nn

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.lora_file import JOINT_ATTENTION, JOINT_FEED_FORWARD, presets
from cdm_lightning.backbones.packing import dtype_of_call, grid_ids, pack, renormalised, rounded_timestep, unpack
from cdm_lightning.backbones.weights_dtype import weights_dtype


class LongCatBackbone(PipelineBackbone):
    """The backbone of a `LongCatImagePipeline`. `PipelineSettings` describes the arguments."""

    title = "LongCat"
    pipeline_class = LongCatImagePipeline
    transformer_class = LongCatImageTransformer2DModel
    block_types = (LongCatImageTransformerBlock, LongCatImageSingleTransformerBlock)
    lora_targets = presets(JOINT_ATTENTION, (*JOINT_FEED_FORWARD, "proj_mlp"))
    parts = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "text_processor")
    time_embedding = "time_embed"
    text_tokens = range(512, 513)  # fixed by the pipeline
    has_language_head = True
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0, "enable_prompt_rewrite": False}
    notes = (
        "`guidance_scale` is 1: one network call a step.",
        "`enable_prompt_rewrite=False`: the student was trained on prompts as they are, and rewriting runs a language model.",
    )

    @property
    def latent_channels(self) -> int:
        """C, the number of channels of a latent. The network packs 2 x 2 positions of a latent into one token."""
        return self.network_config["in_channels"] // 4

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, C, h, w) in float32 for x (B, C, h, w) and sigma (B,)."""
        (height, width), text = x.shape[2:], cond["prompt_embeds"]
        place = torch.arange(text.shape[1], device=x.device)
        output = network(
            hidden_states=pack(x).to(weights_dtype(network)),
            timestep=rounded_timestep(sigma, dtype_of_call(network, x)),
            encoder_hidden_states=text.to(weights_dtype(network)),
            txt_ids=torch.stack([torch.zeros_like(place), place, place], dim=1).float(),
            img_ids=grid_ids(height, width, (1, text.shape[1], text.shape[1]), x.device),
            return_dict=False,
        )[0]
        return unpack(output.float(), height, width)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Apply classifier-free guidance as the pipeline does.

        If a token's guided velocity has a larger norm than its conditional velocity, the guided velocity is scaled down
        to the same norm.
        """
        return renormalised(cond, super().guide(cond, uncond, scale), low=0.0, high=1.0)

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return {"prompt_embeds": (B, 512, D)} in float32, uninitialized, for B = `batch`."""
        width = self.network_config["joint_attention_dim"]
        return {"prompt_embeds": torch.empty(batch, self.text_length, width)}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return {"prompt_embeds": (B, 512, D)} in float32."""
        embeds, _ = self._text_parts.encode_prompt(prompts)
        return {"prompt_embeds": embeds.float()}
