"""Attention of SD3 with one T5 padding token in place of about two hundred identical ones, with the same result.

Stock SD3 pads T5 tokens to 256 and attends to all of them. If the text encoder gives every padding token the same
embedding (as in the bundled tiny pipeline, whose T5 has no relative positions), these tokens stay identical in every
block, because the text stream of the network has no positions either. In a softmax, n equal keys with equal values have
the weight of one key whose logit is larger by log n. Keeping one of them is therefore the same mathematics at a tenth of
the cost.
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
    """Joint attention of SD3 (as diffusers' `JointAttnProcessor2_0`) that lets the last text token stand for all padding.

    `full_length` is the number of text tokens of the stock pipeline (CLIP + T5). In a text of N < `full_length` tokens, the
    last token counts `full_length - N + 1` times, as if it had not been shortened. Texts of full length are as usual.
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
        """Return what to add to attention logits, (1, 1, 1, image + text tokens): log of each key's count; None at full length."""
        key = (image_tokens, text_tokens, dtype, device)
        if torch.compiler.is_compiling():  # a cache would make the second call a different program and recompile it
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
    """Normalise x (B, T, H, d): its first lengths[0] tokens by diffusers' `RMSNorm` norms[0], the next by norms[1], ...

    `x` is returned unchanged if norms[0] is None. One pass for all norms takes a quarter of the operations of a call per norm.
    """
    if norms[0] is None:
        return x
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norms[0].eps)
    weights = [norm.weight.expand(length, -1) for norm, length in zip(norms, lengths, strict=True)]
    return x * scale * torch.cat(weights)[:, None]


def compact_text(embeds: Tensor, keep: int) -> Tensor:
    """Shorten text (B, N, D) to (B, keep + 1, D): its first `keep` tokens, and its last one, which stands for the others.

    Texts of at most `keep` + 1 tokens are returned unchanged.
    """
    if keep + 1 >= embeds.shape[1]:
        return embeds
    return torch.cat([embeds[:, :keep], embeds[:, -1:]], dim=1)


def lengthened(embeds: Tensor, tokens: int) -> Tensor:
    """Lengthen shortened text (B, N, D) to (B, tokens, D) by repeating its last token; attention gives the same result."""
    more = tokens - embeds.shape[1]
    return torch.cat([embeds, embeds[:, -1:].expand(-1, more, -1)], dim=1) if more > 0 else embeds


def use_compact_padding(network: nn.Module, full_length: int) -> None:
    """Use `CompactPaddingAttention` in every attention of an `SD3Transformer2DModel`, in place; its weights stay the same."""
    transformer = cast("SD3Transformer2DModel", network)
    compact: Any = {name: CompactPaddingAttention(full_length) for name in transformer.attn_processors}
    transformer.set_attn_processor(compact)  # its type declares only the processors of diffusers
