"""Attention of SD3 that keeps one T5 padding token instead of about two hundred identical ones. The result is the same.

SD3 pads T5 tokens to 256 and attends to all of them. In the bundled tiny pipeline, T5 has no relative positions, so all
padding tokens have the same embedding. They stay identical in every block, because the network's text tokens have no
positions either. In attention, n tokens with equal keys and equal values count as much as one of them whose logit is
larger by log n. Therefore one padding token whose logit is raised by log n gives the same result as n padding tokens,
with much less computation.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel


class CompactPaddingAttention:
    """Joint attention of SD3 in which the last text token stands for all padding tokens.

    It replaces diffusers' `JointAttnProcessor2_0`. `full_length` is the number of text tokens in the stock pipeline (CLIP and
    T5). In a shortened text of N tokens, the last token counts as `full_length - N + 1` tokens. A text of full length is treated
    as in the stock pipeline.
    """

    def __init__(self, full_length: int) -> None:
        self.full_length = full_length
        self._biases: dict[tuple, Tensor | None] = {}  # keyed by the arguments of `bias`

    def __call__(
        self,
        attn: Any,  # the `Attention` of diffusers, which declares its parts as plain modules
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        """Return image tokens (B, M, D) and text tokens (B, N, D) after attention, in the same shapes."""
        image, text = hidden_states, encoder_hidden_states
        tokens = (image.shape[1], text.shape[1])
        parts = [attn.to_q(image), attn.add_q_proj(text), attn.to_k(image), attn.add_k_proj(text)]
        both = torch.cat(parts, dim=1).unflatten(-1, (attn.heads, -1))
        both = normalised(both, [attn.norm_q, attn.norm_added_q, attn.norm_k, attn.norm_added_k], tokens * 2)
        query, key = both.transpose(1, 2).chunk(2, dim=2)
        value = torch.cat([attn.to_v(image), attn.add_v_proj(text)], dim=1).unflatten(-1, (attn.heads, -1))
        bias = self.bias(*tokens, query.dtype, query.device)
        out = F.scaled_dot_product_attention(query, key, value.transpose(1, 2), attn_mask=bias)
        image, text = out.transpose(1, 2).flatten(2).to(query.dtype).split(tokens, dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    def bias(self, image_tokens: int, text_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the bias of the attention logits, (1, 1, 1, image + text tokens), or None for a text of full length.

        The bias of a key is the logarithm of the number of tokens that the key stands for.
        """
        key = (image_tokens, text_tokens, dtype, device)
        if torch.compiler.is_compiling():  # a cache would make torch.compile compile the second call again
            return self._make_bias(*key)
        if key not in self._biases:
            self._biases[key] = self._make_bias(*key)
        return self._biases[key]

    @torch.inference_mode(False)  # a training step may use the tensor that a validation made
    def _make_bias(
        self, image_tokens: int, text_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        copies = self.full_length - text_tokens + 1
        if copies <= 1:
            return None
        bias = torch.zeros(1, 1, 1, image_tokens + text_tokens, dtype=dtype, device=device)
        bias[..., -1] = math.log(copies)
        return bias


def normalised(x: Tensor, norms: Sequence[Any], lengths: Sequence[int]) -> Tensor:
    """Normalise x (B, T, H, d) by several of diffusers' `RMSNorm`s: the first lengths[0] tokens by norms[0], and so on.

    If norms[0] is None (a network without these norms), `x` is returned unchanged. Calling each norm separately would take four
    times as many operations.
    """
    if norms[0] is None:
        return x
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norms[0].eps)
    weights = [norm.weight.expand(length, -1) for norm, length in zip(norms, lengths, strict=True)]
    return x * scale * torch.cat(weights)[:, None]


def compact_text(embeds: Tensor, keep: int) -> Tensor:
    """Shorten text embeddings (B, N, D) to (B, keep + 1, D): the first `keep` tokens and the last one.

    The last token stands for those that are left out. Texts of at most `keep` + 1 tokens are returned unchanged.
    """
    if keep + 1 >= embeds.shape[1]:
        return embeds
    return torch.cat([embeds[:, :keep], embeds[:, -1:]], dim=1)


def lengthened(embeds: Tensor, tokens: int) -> Tensor:
    """Lengthen shortened text embeddings (B, N, D) to (B, tokens, D) by repeating the last token.

    `CompactPaddingAttention` gives the same result for the shortened and the lengthened embeddings.
    """
    more = tokens - embeds.shape[1]
    return torch.cat([embeds, embeds[:, -1:].expand(-1, more, -1)], dim=1) if more > 0 else embeds


def use_compact_padding(network: nn.Module, full_length: int) -> None:
    """Make every attention layer of an `SD3Transformer2DModel` compute by `CompactPaddingAttention`, in place.

    The weights stay the same.
    """
    transformer = cast("SD3Transformer2DModel", network)
    compact: Any = {name: CompactPaddingAttention(full_length) for name in transformer.attn_processors}
    transformer.set_attn_processor(compact)  # its type declares only the processors of diffusers
