"""The backbone for Stable Diffusion 3 and 3.5 (`StableDiffusion3Pipeline` of diffusers).

Shapes: B batch, (C, h, w) latent, N text tokens (CLIP, then T5), D their width, P the width of the pooled text embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMapEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.backbones.compact_text import lengthened, use_compact_padding
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.lora_file import JOINT_ATTENTION, JOINT_FEED_FORWARD, presets
from cdm_lightning.backbones.pipeline_settings import shared_property
from cdm_lightning.backbones.plain_scheduler import plain_scheduler
from cdm_lightning.backbones.sd3_text import PromptEncoder
from cdm_lightning.backbones.weights_dtype import weights_dtype
from cdm_lightning.kinds import Tokens

CLIP_TOKENS = 77  # the value of every published pipeline
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(eq=False)
class SD3Backbone(PipelineBackbone):
    """The backbone of a `StableDiffusion3Pipeline`, from a local folder or the hub. Files are read only when they are needed.

    `PipelineSettings` describes the arguments except `compact_text`. `compact_text=k` saves computation: one token
    replaces the identical T5 padding tokens after the first k T5 tokens, with the same result (see `compact_text.py`).
    With `compact_text=None`, all padding is kept, as in the stock pipeline.
    """

    title = "SD3"
    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    block_types = (JointTransformerBlock,)
    lora_targets = presets(JOINT_ATTENTION, JOINT_FEED_FORWARD)
    parts = ("transformer", "scheduler", "vae", *TEXT_PARTS)
    shift_options = ()
    time_embedding = "time_text_embed"

    compact_text: Tokens | None = None

    # ---- sizes

    @property
    def patch(self) -> int:
        """The patch size of the transformer: latent positions per token along one side."""
        return self.network_config["patch_size"]

    @property
    def native_side(self) -> int:
        """The default height and width of an image, in pixels."""
        return self.network_config["sample_size"] * self.vae_factor

    @property
    def largest_side(self) -> int:
        """The largest allowed side of an image, in pixels. The network has no position embeddings beyond it."""
        return self.network_config["pos_embed_max_size"] * self.patch * self.vae_factor

    # ---- networks

    def _finished(self, network: nn.Module) -> nn.Module:
        if self.compact_text is not None:
            use_compact_padding(network, self.clip_tokens + self.text_length)
        return network

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, C, h, w) in float32 for x (B, C, h, w) and sigma (B,). Sigma stays in float32."""
        dtype = weights_dtype(network)
        output = network(
            hidden_states=x.to(dtype),
            timestep=sigma.float() * self.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output.float()

    def exported_scheduler(self, nfe: int) -> FlowMapEulerDiscreteScheduler:
        """Return a scheduler that computes the sigmas of training itself, because the pipeline passes it no sigmas."""
        return plain_scheduler(self.scheduler, nfe)

    # ---- text

    @property
    def clip_tokens(self) -> int:
        """The number of CLIP tokens in a text. They come before the T5 tokens."""
        return int(self.tokenizer_config.get("model_max_length", CLIP_TOKENS))

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D), "pooled": (B, P)} in float32, uninitialized, for B = `batch`.

        With `compact_text`, N is the number of tokens for prompts of at most `compact_text` T5 tokens. A batch with a
        longer prompt has more tokens.
        """
        config, t5_tokens = self.network_config, self.text_length
        if self.compact_text is not None:
            t5_tokens = min(t5_tokens, self.compact_text + 1)
        return {
            "prompt_embeds": torch.empty(batch, self.clip_tokens + t5_tokens, config["joint_attention_dim"]),
            "pooled": torch.empty(batch, config["pooled_projection_dim"]),
        }

    def alike(self, conds: Sequence[Conditioning]) -> Sequence[Conditioning] | None:
        """Return the conditioning of several batches with equal shapes, or None if this is impossible.

        With `compact_text`, batches can have different numbers of text tokens. Shorter texts are lengthened by copies
        of their last token, which is padding.
        """
        if self.compact_text is not None:
            longest = max(cond["prompt_embeds"].shape[1] for cond in conds)
            conds = [{**cond, "prompt_embeds": lengthened(cond["prompt_embeds"], longest)} for cond in conds]
        return super().alike(conds)

    @shared_property
    def _text(self) -> PromptEncoder:
        return PromptEncoder(self._text_parts, self.text_length, self.compact_text, name=self.pretrained)

    def setup(self, device: torch.device) -> None:
        """Load the VAE and the text encoders, and move them to `device`. With a text cache, no text encoder is loaded.

        Raises `UserError` if the VAE or a text encoder fails in a test, or if `compact_text` is set but the T5 padding
        tokens differ from each other.
        """
        super().setup(device)
        if self.text_cache is None:
            _ = self._text  # checks that the padding can be folded

    @property
    def text_fingerprint(self) -> dict[str, str]:
        """The entries of `PipelineBackbone.text_fingerprint`, and "compact_text"."""
        return super().text_fingerprint | {"compact_text": str(self.compact_text)}

    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D), "pooled": (B, P)} in float32."""
        return self._text.encode(prompts)
