"""Encode prompts for SD3 by the stock pipeline's own `encode_prompt`.

Shapes: B prompts, N text tokens (CLIP, then T5), D their width, P the width of the pooled text embedding.
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
    """A logging filter that shows the pipeline's warning about a truncated prompt only once for CLIP and once for T5."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show the message. The result is False for a truncation warning that was shown before."""
        kind = record.getMessage()[:60]
        known = kind.startswith("The following part of your input was truncated") and kind in self.told
        self.told.add(kind)
        return not known


FIRST_CUT = FirstCut()


class PromptEncoder:
    """An encoder of prompts that uses the three text encoders of `pipeline`. T5 gives `t5_tokens` tokens.

    With `compact=k`, one token replaces all T5 padding after the first k T5 tokens (see `compact_text.py`). A batch
    with a longer prompt keeps more than k tokens. With `compact=None`, all padding is kept. `name` is the pipeline's
    name in messages.

    Raises `UserError` if the padding tokens differ from each other, so that one token cannot replace them.
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
        """The number of CLIP tokens in a text. They come before the T5 tokens."""
        return self.pipeline.tokenizer_max_length

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return {"prompt_embeds": (B, N, D), "pooled": (B, P)} in float32. The prompt "" is unconditional."""
        embeds, pooled = self._stock_encode(prompts)
        if self.compact is not None:
            embeds = compact_text(embeds, max(self.clip_tokens + self.compact, tokens_before_padding(embeds)))
        return {"prompt_embeds": embeds, "pooled": pooled}

    @torch.no_grad()
    def _stock_encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encode: Any = self.pipeline.encode_prompt  # its type does not declare the None that it takes and returns
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
        """Raise `UserError` if the T5 padding tokens of the empty prompt differ.

        The first T5 token of the empty prompt is the end token, and all others are padding.
        """
        embeds, _ = self._stock_encode([""])
        if tokens_before_padding(embeds) > self.clip_tokens + 1:
            raise UserError(
                f"compact_text={self.compact} cannot be used with {name}, because its T5 padding tokens are not identical; "
                "set backbone.compact_text=null"
            )


def tokens_before_padding(embeds: Tensor) -> int:
    """Return the number of leading tokens of `embeds` (B, N, D) that are not padding.

    Padding tokens are the tokens at the end that equal the last token, up to rounding.
    """
    last = embeds[:, -1:]
    differs = ((embeds - last).abs().amax(-1) > 1e-5 * last.abs().amax()).any(0)
    return int(differs.nonzero().max()) + 1 if differs.any() else 0
