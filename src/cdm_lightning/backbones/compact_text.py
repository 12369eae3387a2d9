"""One padding token in place of two hundred identical ones, with the same result.

Stock SD3 pads T5 tokens to 256 and attends to all of them. Where the text encoder gives every padding token the same
embedding (the bundled tiny pipeline: its T5 has no relative positions), those tokens stay identical through every block,
because the text stream of the network has no positions either. n equal keys with equal values weigh in a softmax like
one key whose logit is larger by log n; so keeping one of them is the same mathematics at a tenth of the cost.
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
    """Joint attention of SD3 (the mathematics of diffusers' `JointAttnProcessor2_0`) whose last text token stands for all padding.

    `full_length` is the number of text tokens that the stock pipeline uses (CLIP + T5); a text of fewer tokens, N, is taken
    to be compacted: its last token then counts `full_length - N + 1` times. A text of full length is treated as stock.
    """

    def __init__(self, full_length: int) -> None:
        self.full_length = full_length
        self._biases: dict[tuple, Tensor | None] = {}  # by the arguments of `bias`

    def __call__(
        self,
        attn: Any,  # the `Attention` of diffusers, whose parts are declared as modules of no kind
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, M, D) and text tokens (B, N, D) -> both, attended."""
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
        """(1, 1, 1, image + text) added to the logits: log of how often each key counts; None for a text of full length."""
        key = (image_tokens, text_tokens, dtype, device)
        if torch.compiler.is_compiling():  # a second call that finds what the first one made would be another program
            return self._make_bias(*key)
        if key not in self._biases:
            self._biases[key] = self._make_bias(*key)
        return self._biases[key]

    @torch.inference_mode(False)  # it may be kept from a validation for a training step
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
    """x (B, T, H, d), the first lengths[0] tokens of it by the `RMSNorm` norms[0] of diffusers and so on: all at once.

    A quarter of the operations of one call a norm, which is what a small network's attention spends its time on.
    """
    if norms[0] is None:
        return x
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norms[0].eps)
    weights = [norm.weight.expand(length, -1) for norm, length in zip(norms, lengths, strict=True)]
    return x * scale * torch.cat(weights)[:, None]


def compact_text(embeds: Tensor, keep: int) -> Tensor:
    """(B, N, D) -> (B, keep + 1, D): the first `keep` tokens and the last one, which stands for all that were dropped."""
    if keep + 1 >= embeds.shape[1]:
        return embeds
    return torch.cat([embeds[:, :keep], embeds[:, -1:]], dim=1)


def use_compact_padding(network: nn.Module, full_length: int) -> None:
    """Give every attention of an `SD3Transformer2DModel` the compact form; a saved network carries nothing of it."""
    transformer = cast("SD3Transformer2DModel", network)
    compact: Any = {name: CompactPaddingAttention(full_length) for name in transformer.attn_processors}
    transformer.set_attn_processor(compact)  # declared to take the processors of diffusers alone
