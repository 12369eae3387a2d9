"""Gradient checkpointing: which activations the backward pass recomputes, and which are kept in memory."""

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

Guard = Callable[[nn.Module], Callable[..., Any]]  # a block -> a function that runs it in the same way each time

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
    """The first `share` of a network's blocks (rounded up) recompute their activations; the other blocks keep them.

    The backward pass frees the kept activations before it reaches the first blocks. With `attention=False`, the results of
    attention are kept in all blocks: to recompute them takes much time and saves little memory. In SD3-Medium at 1024 x 1024
    pixels, attention is a third of the operations, but its result is one tensor of dozens.
    """

    share: float = 0.0
    attention: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(
                f"compute.gradient_checkpointing must be a share of the blocks from 0 to 1, got {self.share:g}"
            )

    def function(
        self, network: nn.Module, block_types: tuple[type[nn.Module], ...], guard: Guard | None = None
    ) -> CheckpointFunction:
        """Return the function that runs the network's blocks; `guard` wraps blocks that depend on more than their arguments."""
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
