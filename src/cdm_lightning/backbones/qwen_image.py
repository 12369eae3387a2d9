"""The backbone for Qwen-Image (`QwenImagePipeline` of diffusers).

Shapes: B batch, (C, h, w) latent, N text tokens of Qwen2.5-VL with a mask, D their width. The codec is a video codec; an image
is a video of one frame. The scheduler rescales the sigmas of each rollout so that the last one is `shift_terminal`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.lora_file import JOINT_ATTENTION, presets
from cdm_lightning.backbones.packing import dtype_of_call, pack, renormalised, rounded_timestep, unpack
from cdm_lightning.backbones.weights_dtype import weights_dtype

FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImageBackbone(PipelineBackbone):
    """The backbone of a `QwenImagePipeline`. `PipelineSettings` describes the arguments.

    Texts are padded to `max_sequence_length` tokens, so that all prompts have conditioning of the same shape. A mask hides the
    padding from the network. A smaller `max_sequence_length` makes the network faster.
    """

    title = "Qwen-Image"
    pipeline_class = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    block_types = (QwenImageTransformerBlock,)
    lora_targets = presets(JOINT_ATTENTION, FEED_FORWARD)
    parts = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
    time_embedding = "time_text_embed"
    text_tokens = range(1, 1025)
    shift_options = ("use_dynamic_shifting", "shift_terminal")
    has_language_head = True
    unguided: ClassVar[Mapping[str, Any]] = {"true_cfg_scale": 1.0}
    notes = ("`true_cfg_scale` is 1: one network call a step.",)

    @property
    def vae_factor(self) -> int:
        """The factor of the image codec: pixels per latent position along one side."""
        return 2 ** len(self.vae_config["temperal_downsample"])

    @property
    def latent_channels(self) -> int:
        """C, the number of channels of a latent. The network packs 2 x 2 positions of a latent into one token."""
        return self.network_config["in_channels"] // 4

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, C, h, w) in float32 for x (B, C, h, w) and sigma (B,)."""
        height, width = x.shape[2:]
        output = network(
            hidden_states=pack(x).to(weights_dtype(network)),
            timestep=rounded_timestep(sigma, dtype_of_call(network, x)),
            encoder_hidden_states=cond["prompt_embeds"].to(weights_dtype(network)),
            encoder_hidden_states_mask=cond["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(output.float(), height, width)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Apply guidance as the pipeline does: a token's guided velocity gets the norm of its conditional velocity."""
        return renormalised(cond, super().guide(cond, uncond, scale))

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D) float32, "mask": (B, N) bool}, uninitialized, for B = `batch`."""
        tokens, width = self.text_length, self.network_config["joint_attention_dim"]
        return {
            "prompt_embeds": torch.empty(batch, tokens, width),
            "mask": torch.empty(batch, tokens, dtype=torch.bool),
        }

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D) float32, "mask": (B, N) bool}, padded to N = `max_sequence_length`.

        Prompts are encoded one at a time. The pipeline pads a batch to its longest prompt, so in a batch the last bits of an
        embedding would depend on the other prompts. Embeddings from a text cache would then differ from embeddings that are
        computed during training.
        """
        encoded = [self._encode_one(prompt) for prompt in prompts]
        return {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}

    def _encode_one(self, prompt: str) -> Conditioning:
        length = self.text_length
        embeds, mask = self._text_parts.encode_prompt([prompt], max_sequence_length=length)
        if mask is None:  # there is no padding
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        padding = length - embeds.shape[1]
        return {"prompt_embeds": F.pad(embeds.float(), (0, 0, 0, padding)), "mask": F.pad(mask.bool(), (0, padding))}

    # ---- images

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Decode clean latents x0 (B, C, h, w) into images (B, 3, H, W) in [0, 1], as the stock pipeline does."""
        mean, std = self._latent_statistics(x0)
        frames = self._codec.vae.decode(x0.float()[:, :, None] / (1.0 / std) + mean, return_dict=False)[0]
        return self._codec.image_processor.postprocess(frames[:, :, 0], output_type="pt")

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] into latents (B, C, h, w): the scaled mode of the VAE's posterior."""
        mean, std = self._latent_statistics(images)
        frames = images.float()[:, :, None] * 2 - 1
        return ((self._codec.vae.encode(frames).latent_dist.mode() - mean) / std)[:, :, 0]

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the codec's latents, (1, C, 1, 1, 1) each."""
        config = self._codec.vae.config
        mean, std = (
            torch.tensor(values, device=like.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def exported_scheduler(self, nfe: int) -> FlowMatchEulerDiscreteScheduler:
        """Return the pipeline's own scheduler.

        For `nfe` = 1, return a copy without the option `shift_terminal`, because this option would lead to 0 / 0.
        """
        return self.scheduler if nfe > 1 else self._shift
