"""Gradient checkpointing: which activations the backward pass recomputes, and which stay in memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cdm_lightning.backbones.base import CheckpointFunction
from cdm_lightning.errors import UserError

Guard = Callable[
    [nn.Module], Callable[..., Any]
]  # block -> a function that runs it with the LoRA adapter that is on now

ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in (
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "flash_attention_for_cpu",
        "fused_attention_overrideable",
    )
)  # the operators that `scaled_dot_product_attention` may call, depending on device, dtype and mask


@dataclass(frozen=True)
class Recomputation:
    """Which blocks of a network recompute their activations in the backward pass; the other blocks keep them in memory.

    `share`, from 0 to 1, is the share of the blocks that recompute, rounded up to whole blocks. These are the first
    blocks, because the backward pass reaches them last, when the activations of the other blocks are already freed.
    With `attention=False`, every block keeps its results of attention in memory, because they are slow to recompute and
    small. In SD3-Medium at 1024 x 1024 pixels, attention is a third of the operations, but its result is only one of
    dozens of stored tensors. Raises UserError for a share outside [0, 1].
    """

    share: float = 0.0
    attention: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(
                f"compute.gradient_checkpointing={self.share:g} must be a share of the blocks: a number from 0 to 1, true or false"
            )

    def function(
        self, network: nn.Module, block_types: tuple[type[nn.Module], ...], guard: Guard | None = None
    ) -> CheckpointFunction:
        """Return the function (block, *arguments) -> result with which `network` calls each of its blocks.

        `block_types` are the classes of the blocks. If several LoRA adapters share the blocks, `guard` is needed:
        `guard(block)` returns a function that always runs the block with the adapter that was on when `guard` was
        called, also when the backward pass runs the block again.
        """
        blocks = [block for block in network.modules() if isinstance(block, block_types)]
        kept = set(blocks[math.ceil(self.share * len(blocks)) :])
        context: dict[str, Any] = (
            {} if self.attention else {"context_fn": partial(create_selective_checkpoint_contexts, [*ATTENTION])}
        )

        def run(block: nn.Module, *arguments: Any) -> Any:
            if block in kept:
                return block(*arguments)
            return checkpoint(block if guard is None else guard(block), *arguments, use_reentrant=False, **context)

        return run
