"""One padding token in place of two hundred identical ones, with the same result.

Stock SD3 pads T5 tokens to 256 and attends to all of them. Where the text encoder gives every padding token the same
embedding (the bundled tiny pipeline: its T5 has no relative positions), those tokens stay identical through every block,
because the text stream of the network has no positions either. n equal keys with equal values weigh in a softmax like
one key whose logit is larger by log n; so keeping one of them is the same mathematics at a tenth of the cost.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CompactPaddingAttention:
    """Joint attention of SD3 (the mathematics of diffusers' `JointAttnProcessor2_0`) whose last text token stands for all padding.

    `full_length` is the number of text tokens that the stock pipeline uses (CLIP + T5); a text of fewer tokens, N, is taken
    to be compacted: its last token then counts `full_length - N + 1` times. A text of full length is treated as stock.
    """

    def __init__(self, full_length: int) -> None:
        self.full_length = full_length

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, M, D) and text tokens (B, N, D) -> both, attended."""
        image_tokens, text_tokens = hidden_states.shape[1], encoder_hidden_states.shape[1]

        def heads(x: Tensor, norm: nn.Module | None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat(
            [heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], dim=2
        )
        key = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], dim=2)
        value = torch.cat([heads(attn.to_v(image), None), heads(attn.add_v_proj(text), None)], dim=2)
        bias = self.bias(image_tokens, text_tokens, query)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        image, text = out[:, :image_tokens], out[:, image_tokens:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    def bias(self, image_tokens: int, text_tokens: int, like: Tensor) -> Tensor | None:
        """(1, 1, 1, image + text) added to the logits: log of how often each key counts; None for a text of full length."""
        copies = self.full_length - text_tokens + 1
        if copies <= 1:
            return None
        bias = torch.zeros(1, 1, 1, image_tokens + text_tokens, dtype=like.dtype, device=like.device)
        bias[..., -1] = math.log(copies)
        return bias


def compact_text(embeds: Tensor, keep: int) -> Tensor:
    """(B, N, D) -> (B, keep + 1, D): the first `keep` tokens and the last one, which stands for all that were dropped."""
    if keep + 1 >= embeds.shape[1]:
        return embeds
    return torch.cat([embeds[:, :keep], embeds[:, -1:]], dim=1)


def use_compact_padding(network: nn.Module, full_length: int) -> None:
    """Give every attention of an `SD3Transformer2DModel` the compact form; a saved network carries nothing of it."""
    processors: Mapping[str, object] = network.attn_processors
    network.set_attn_processor({name: CompactPaddingAttention(full_length) for name in processors})
