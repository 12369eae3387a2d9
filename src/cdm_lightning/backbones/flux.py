"""The backbone for FLUX.1-dev and FLUX.1-schnell (`FluxPipeline` of diffusers).

Shapes: B batch, (C, h, w) latent, N text tokens of T5, D their width, P the width of the pooled CLIP embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.lora_file import JOINT_ATTENTION, JOINT_FEED_FORWARD, presets
from cdm_lightning.backbones.packing import dtype_of_call, grid_ids, pack, rounded_timestep, unpack
from cdm_lightning.backbones.student_folder import StudentCall
from cdm_lightning.backbones.weights_dtype import weights_dtype
from cdm_lightning.kinds import Guidance

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(eq=False)
class FluxBackbone(PipelineBackbone):
    """The backbone of a `FluxPipeline`.

    `PipelineSettings` describes all arguments except `guidance_embed`. A guidance-distilled network (FLUX.1-dev) takes the
    guidance scale as an input. `guidance_embed` is the value of this input for student, teacher and fake score. It has no
    effect for a network without this input (FLUX.1-schnell).
    """

    title = "FLUX"
    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel
    block_types = (FluxTransformerBlock, FluxSingleTransformerBlock)
    lora_targets = presets(JOINT_ATTENTION, (*JOINT_FEED_FORWARD, "proj_mlp"))
    parts = ("transformer", "scheduler", "vae", *TEXT_PARTS)
    time_embedding = "time_text_embed"
    unguided: ClassVar[Mapping[str, Any]] = {}  # the pipeline applies guidance only with a negative prompt

    guidance_embed: Guidance = 3.5

    @property
    def latent_channels(self) -> int:
        """C, the number of channels of a latent. The network packs 2 x 2 positions of a latent into one token."""
        return self.network_config["in_channels"] // 4

    @property
    def is_told_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an input. FLUX.1-dev does, FLUX.1-schnell does not."""
        return bool(self.network_config["guidance_embeds"])

    def cautions(self, guidance_scale: float) -> list[str]:
        """Return a warning if the teacher is a few-step model (FLUX.1-schnell), or if guidance would act twice.

        Guidance acts twice if `guidance_scale` is not 0 and `guidance_embed` is above 1.
        """
        if not self.is_told_guidance:
            return [
                "this teacher is already distilled to few steps (FLUX.1-schnell), but distribution matching needs the predictions "
                "of a model with many steps; use backbone=flux_dev"
            ]
        if guidance_scale and self.guidance_embed > 1:
            return [
                f"guidance acts twice: objective.guidance_scale={guidance_scale} is added to the network's own guidance, "
                f"backbone.guidance_embed={self.guidance_embed}; lower one of them if images are over-saturated"
            ]
        return []

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, C, h, w) in float32 for x (B, C, h, w) and sigma (B,)."""
        (height, width), text = x.shape[2:], cond["prompt_embeds"]
        guidance = torch.full_like(sigma, self.guidance_embed, dtype=torch.float32) if self.is_told_guidance else None
        output = network(
            hidden_states=pack(x).to(weights_dtype(network)),
            timestep=rounded_timestep(sigma, dtype_of_call(network, x)),
            guidance=guidance,
            encoder_hidden_states=text.to(weights_dtype(network)),
            pooled_projections=cond["pooled"].to(weights_dtype(network)),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            img_ids=grid_ids(height, width, (0, 0, 0), x.device),
            return_dict=False,
        )[0]
        return unpack(output.float(), height, width)

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D), "pooled": (B, P)} in float32, uninitialized, for B = `batch`."""
        config = self.network_config
        return {
            "prompt_embeds": torch.empty(batch, self.text_length, config["joint_attention_dim"]),
            "pooled": torch.empty(batch, config["pooled_projection_dim"]),
        }

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D), "pooled": (B, P)} in float32."""
        embeds, pooled, _ = self._text_parts.encode_prompt(
            prompts, device=self._text_parts.device, max_sequence_length=self.text_length
        )
        return {"prompt_embeds": embeds.float(), "pooled": pooled.float()}

    def _student_call(self, nfe: int) -> StudentCall:
        call = super()._student_call(nfe)
        if not self.is_told_guidance:
            return call.with_(notes=("The network has no guidance: one call a step.",))
        told = f"`guidance_scale={self.guidance_embed}` is an input of the network; there is one network call a step."
        return call.with_(arguments={**call.arguments, "guidance_scale": self.guidance_embed}, notes=(told,))

    @classmethod
    def settings_of(cls, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that `call` sets for `height`, `width`, `max_sequence_length` and `guidance_embed`.

        `call` holds the arguments for calling an exported student (see `student_folder.read_call`).
        `call["guidance_scale"]` is the value for `guidance_embed`.
        """
        told = {"guidance_embed": call["guidance_scale"]} if "guidance_scale" in call else {}
        return super().settings_of(call) | told
