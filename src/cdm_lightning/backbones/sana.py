"""The backbone for SANA (`SanaPipeline` of diffusers).

Shapes: B batch, (C, h, w) latent, N text tokens of Gemma with a mask, D their width. The published pipeline uses a multi-step
solver. The student is trained, sampled and exported with an Euler scheduler that has the published pipeline's shift.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.lora_file import presets
from cdm_lightning.backbones.plain_scheduler import plain_scheduler
from cdm_lightning.backbones.settings_file import read_settings
from cdm_lightning.backbones.weights_dtype import weights_dtype
from cdm_lightning.errors import UserError


class SanaBackbone(PipelineBackbone):
    """The backbone of a `SanaPipeline`. `PipelineSettings` describes the arguments."""

    title = "SANA"
    pipeline_class = SanaPipeline
    transformer_class = SanaTransformer2DModel
    block_types = (SanaTransformerBlock,)
    lora_targets = presets(("to_q", "to_k", "to_v", "to_out.0"), ())  # its feed-forward layers are convolutions
    parts = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
    time_embedding = "time_embed.emb"  # only its embedding: `time_embed` itself returns a tuple
    text_tokens = range(1, 301)
    shift_options = ()
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0, "use_resolution_binning": False}
    notes = (
        "`guidance_scale` is 1: one network call a step.",
        "`use_resolution_binning=False`: pictures are made in the size that was trained, not resized to it.",
    )

    # ---- sizes and sigmas

    @property
    def vae_factor(self) -> int:
        """The factor of the image codec: pixels per latent position along one side."""
        return 2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1)

    @property
    def patch(self) -> int:
        """The patch size of the transformer: latent positions per token along one side."""
        return self.network_config["patch_size"]

    @property
    def size_unit(self) -> int:
        """Both sides of an image must be multiples of this number of pixels. The pipeline requires multiples of 32."""
        return math.lcm(32, super().size_unit)

    @property
    def native_side(self) -> int:
        """The default height and width of an image, in pixels."""
        return self.network_config["sample_size"] * self.vae_factor

    def call_sizes(self) -> dict[str, int]:
        """Return the arguments that a call of the pipeline needs for this backbone's image size and text length.

        "height" and "width" are always included, because the pipeline's default is 1024, whatever the model's own size.
        """
        height, width = self.image_size
        return super().call_sizes() | {"height": height, "width": width}

    def _load_scheduler(self, subfolder: str) -> FlowMatchEulerDiscreteScheduler:
        path = self.folder / subfolder / "scheduler_config.json"
        config = read_settings(path)
        if config.get("_class_name") in (
            FlowMatchEulerDiscreteScheduler.__name__,
            FlowMapEulerDiscreteScheduler.__name__,
        ):
            return super()._load_scheduler(subfolder)
        if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
            raise UserError(
                f"the scheduler of {self.pretrained} is not that of a flow model; restore {path} from the original pipeline"
            )
        return FlowMatchEulerDiscreteScheduler(config.get("num_train_timesteps", 1000), shift=config["flow_shift"])

    def exported_scheduler(self, nfe: int) -> FlowMapEulerDiscreteScheduler:
        """Return a scheduler that computes the sigmas of training itself, because the pipeline passes it no sigmas."""
        return plain_scheduler(self.scheduler, nfe)

    # ---- network and text

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, C, h, w) in float32 for x (B, C, h, w) and sigma (B,). Sigma stays in float32."""
        timestep = sigma.float() * self.scheduler.config.num_train_timesteps
        output = network(
            x.to(weights_dtype(network)),
            encoder_hidden_states=cond["prompt_embeds"].to(weights_dtype(network)),
            encoder_attention_mask=cond["mask"],
            timestep=timestep * self.network_config["timestep_scale"],
            return_dict=False,
        )[0]
        return output.float()

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D) float32, "mask": (B, N) int64}, uninitialized, for B = `batch`."""
        tokens, width = self.text_length, self.network_config["caption_channels"]
        return {
            "prompt_embeds": torch.empty(batch, tokens, width),
            "mask": torch.empty(batch, tokens, dtype=torch.int64),
        }

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D) float32, "mask": (B, N) int64}.

        The pipeline puts a long instruction in front of every prompt. The empty prompt (unconditional) gets no instruction.
        """
        pipeline, instruction = self._text_parts, self.call_default("complex_human_instruction")
        options = {"device": pipeline.device, "max_sequence_length": self.text_length}
        options["do_classifier_free_guidance"] = False
        embeds, mask, _, _ = pipeline.encode_prompt(prompts, complex_human_instruction=instruction, **options)
        blank = torch.tensor([not prompt for prompt in prompts], device=embeds.device)
        if blank.any():
            plain, plain_mask, _, _ = pipeline.encode_prompt([""], complex_human_instruction=None, **options)
            embeds = torch.where(blank[:, None, None], plain, embeds)
            mask = torch.where(blank[:, None], plain_mask, mask)
        return {"prompt_embeds": embeds.float(), "mask": mask}

    # ---- images

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Decode clean latents x0 (B, C, h, w) into images (B, 3, H, W) in [0, 1], as the stock pipeline does."""
        vae = self._codec.vae
        pixels = vae.decode(x0.float() / vae.config.scaling_factor, return_dict=False)[0]
        return self._codec.image_processor.postprocess(pixels, output_type="pt")

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] into clean latents (B, C, h, w), scaled by the codec's `scaling_factor`."""
        vae = self._codec.vae
        return vae.encode(images.float() * 2 - 1).latent * vae.config.scaling_factor
