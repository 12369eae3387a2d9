"""The backbone for Z-Image (`ZImagePipeline` of diffusers).

Shapes: B batch, (C, h, w) latent, N text tokens of Qwen3, D their width. The network differs from the networks of other
families in three ways. It takes lists of samples with texts of different lengths. Its time runs from 0 at noise to 1 at
data. It returns the negative velocity. This file hides these differences from the rest of the package.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ADALN_EMBED_DIM, ZImageTransformerBlock
from torch import Tensor, nn

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.lora_file import presets
from cdm_lightning.backbones.weights_dtype import weights_dtype


class ZImageBackbone(PipelineBackbone):
    """The backbone of a `ZImagePipeline`. `PipelineSettings` describes the arguments.

    The conditioning holds each text padded to `max_sequence_length` tokens, but the network gets each text without this
    padding. The network first has blocks for image tokens alone, then blocks for text tokens alone, then joint blocks.
    The hidden states after a joint block are those of the image tokens, followed by those of the text tokens. The
    network pads the image tokens and the text tokens each to a multiple of 32, and the joint sequences of a batch to
    the length of the longest.
    """

    title = "Z-Image"
    pipeline_class = ZImagePipeline
    transformer_class = ZImageTransformer2DModel
    block_types = (ZImageTransformerBlock,)
    lora_targets = presets(("to_q", "to_k", "to_v", "to_out.0"), ("w1", "w2", "w3"))
    parts = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
    time_embedding = "t_embedder"
    unplannable = (
        "the planner cannot plan Z-Image, because its network computes with the length of each text, which is not "
        "known in advance; choose another backbone"
    )
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 0.0}
    notes = ("`guidance_scale` is 0, not 1: this pipeline adds the guidance to the conditional velocity.",)

    @property
    def native_side(self) -> int:
        """The default height and width of an image, in pixels."""
        return 1024

    @property
    def largest_side(self) -> int:
        """The largest allowed side of an image, in pixels. The network's table of positions limits it."""
        return min(self.network_config["axes_lens"][1:]) * self.patch * self.vae_factor

    @property
    def feature_width(self) -> int:
        """D, the width of the hidden states (B, N, D) after a transformer block."""
        return self.network_config["dim"]

    @property
    def time_embedding_width(self) -> int:
        """D, the width of the time embedding (B, D)."""
        return min(self.feature_width, ADALN_EMBED_DIM)

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, C, h, w) in float32 that `network` predicts for x (B, C, h, w) and sigma (B,).

        `cond` is the conditioning of the B texts.
        """
        texts = cond["prompt_embeds"].to(weights_dtype(network))
        lengths = cond["length"].tolist()  # `length` is on the CPU, so the host does not wait for the device here
        output = network(
            list(x.to(weights_dtype(network))[:, :, None]),  # a video of one frame
            (1000 - sigma.float() * 1000) / 1000,  # in the pipeline's order of operations, for equal rounding
            [text[:length] for text, length in zip(texts, lengths)],
            return_dict=False,
        )[0]
        return -torch.stack([sample.float() for sample in output])[:, :, 0]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D) float32, "length": (B,) int64 on the CPU}, padded to N = `max_sequence_length`."""
        texts, _ = self._text_parts.encode_prompt(
            list(prompts),  # a copy, because the pipeline writes its template into the list
            device=self._text_parts.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        padded = [F.pad(text.float(), (0, 0, 0, self.text_length - len(text))) for text in texts]
        return {"prompt_embeds": torch.stack(padded), "length": torch.tensor([len(text) for text in texts])}
