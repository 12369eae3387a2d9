"""Prompts to the conditioning of SD3 by the stock pipeline's own `encode_prompt`.

Shapes: B prompts, N text tokens (CLIP then T5), D their width, P width of the pooled text.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.backbones.compact_text import compact_text
from cdm_lightning.errors import UserError


class FirstCut(logging.Filter):
    """Lets the pipeline say once for CLIP and once for T5 that it cut a prompt: it would say so at each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is of another kind or the first of its kind."""
        kind = record.getMessage()[:60]
        known = kind.startswith("The following part of your input was truncated") and kind in self.told
        self.told.add(kind)
        return not known


FIRST_CUT = FirstCut()


class PromptEncoder:
    """The three text encoders of `pipeline`; with `compact=k` the T5 padding after the first k T5 tokens is folded.

    A batch with a prompt of more than k T5 tokens keeps as many as it needs. `name` is the pipeline's, for messages.
    UserError if the padding tokens are not alike, so that they cannot be folded.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, t5_tokens: int, compact: int | None, name: str) -> None:
        self.pipeline = pipeline
        self.t5_tokens = t5_tokens
        self.compact = compact
        logging.getLogger(StableDiffusion3Pipeline.__module__).addFilter(FIRST_CUT)
        if compact is not None:
            self._require_equal_padding(name)

    @property
    def clip_tokens(self) -> int:
        """Text tokens before those of T5."""
        return self.pipeline.tokenizer_max_length

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Texts -> {"prompt_embeds": (B, N, D), "pooled": (B, P)} float32; "" is the unconditional prompt."""
        embeds, pooled = self._stock_encode(prompts)
        if self.compact is not None:
            embeds = compact_text(embeds, max(self.clip_tokens + self.compact, tokens_before_padding(embeds)))
        return {"prompt_embeds": embeds, "pooled": pooled}

    @torch.no_grad()
    def _stock_encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encode: Any = self.pipeline.encode_prompt  # declared without the None that it takes and gives
        embeds, _, pooled, _ = encode(
            list(prompts),
            None,
            None,
            device=self.pipeline.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_tokens,
        )
        return embeds.float(), pooled.float()

    def _require_equal_padding(self, name: str) -> None:
        """Look at the empty prompt: its T5 tokens are an end mark, then padding."""
        embeds, _ = self._stock_encode([""])
        if tokens_before_padding(embeds) > self.clip_tokens + 1:
            raise UserError(
                f"compact_text={self.compact} cannot be used with {name}: the padding tokens of its T5 differ from one "
                "another; set compact_text=null"
            )


def tokens_before_padding(embeds: Tensor) -> int:
    """How many leading tokens of embeds (B, N, D) it takes until all the others equal the last, to float rounding."""
    last = embeds[:, -1:]
    differs = ((embeds - last).abs().amax(-1) > 1e-5 * last.abs().amax()).any(0)
    return int(differs.nonzero().max()) + 1 if differs.any() else 0
