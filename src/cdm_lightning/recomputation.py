"""Gradient checkpointing: which activations the backward pass computes anew, and which it finds in memory."""

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

Guard = Callable[[nn.Module], Callable[..., Any]]  # a block -> what runs it twice in the same way

ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in (
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "flash_attention_for_cpu",
        "fused_attention_overrideable",
    )
)  # what `scaled_dot_product_attention` runs, by device, dtype and mask


@dataclass(frozen=True)
class Recomputation:
    """The first `share` of a network's blocks (rounded up) recompute their activations, including attention or except it.

    The other blocks keep them, and the backward pass frees those before it comes to the first ones. Attention costs much time
    for few bytes: a third of the operations of SD3-Medium at 1024 x 1024 pixels, one tensor of dozens.
    """

    share: float = 0.0
    attention: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"module: gradient_checkpointing is a share of the blocks, from 0 to 1, got {self.share:g}")

    def function(
        self, network: nn.Module, block_types: tuple[type[nn.Module], ...], guard: Guard | None = None
    ) -> CheckpointFunction:
        """What runs the blocks of the network; `guard` wraps one whose result depends on more than its arguments."""
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
