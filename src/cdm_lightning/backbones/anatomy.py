"""Access to the inside of a model family's networks: the hidden states (features) after blocks, and the time embedding.

Shapes: B batch, N tokens, D width of a hidden state.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cdm_lightning.errors import UserError
from cdm_lightning.lora.views import RoleView


class Anatomy:
    """The part of `Backbone` that says where a network has its blocks, hidden states (features) and time embedding."""

    block_types: tuple[type[nn.Module], ...] = ()  # the repeated blocks: units of checkpointing and sharding
    time_embedding: str | None = None  # name of the submodule whose output (B, D) carries the time to the blocks

    @property
    def feature_width(self) -> int:
        """D, the width of the hidden states (B, N, D) after a block. Raises `UserError` if the family does not define it."""
        raise UserError(
            f"{type(self).__name__} does not define the width of its hidden features; choose another objective"
        )

    @property
    def time_embedding_width(self) -> int:
        """D, the width of the time embedding (B, D). Raises `UserError` if the family does not define it."""
        raise UserError(
            f"{type(self).__name__} does not define the width of its time embedding; choose another objective"
        )

    def features_after(self, block_output: Any) -> Tensor:
        """Return the hidden states (B, N, D) of the image tokens, given the output of a block.

        Blocks return either these states or a tuple (text states, image states). A family with other outputs overrides this.
        """
        return block_output[-1] if isinstance(block_output, tuple) else block_output

    def blocks_of(self, network: nn.Module) -> list[nn.Module]:
        """Return the repeated blocks of a network, in the order of its modules.

        For a network with shared LoRA weights (a LoRA view), these are the blocks of its base network.
        """
        return [module for module in unwrapped(network).modules() if isinstance(module, self.block_types)]

    def time_module(self, network: nn.Module) -> nn.Module:
        """Return the submodule of a network that embeds the time, so that a hook can be added to it.

        For a network with shared LoRA weights (a LoRA view), it is that of its base network. Raises `UserError` if the family
        does not name this submodule (`time_embedding`) or if the network does not have it.
        """
        if self.time_embedding is None:
            raise UserError(
                f"the objective needs a time embedding that it can add an input to, but {type(self).__name__} defines none; "
                "choose another objective"
            )
        try:
            return unwrapped(network).get_submodule(self.time_embedding)
        except AttributeError as error:
            raise UserError(
                f"{type(network).__name__} has no time embedding {self.time_embedding}; choose another objective"
            ) from error


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network that has the blocks: the base network for a LoRA view (`lora.views`), and otherwise `network` itself."""
    return network.shared.network if isinstance(network, RoleView) else network


def gather_for_backward(network: nn.Module, features: Tensor) -> None:
    """Make a loss on `features` alone differentiable for a network that FSDP2 shards.

    FSDP2 gathers the weights outside the blocks when the backward pass reaches the network's output. A loss on features does
    not use this output, so a hook on `features` gathers them. Without sharding, this does nothing.
    """
    root = unwrapped(network)
    if isinstance(root, FSDPModule) and features.requires_grad:
        features.register_hook(lambda gradient: root.unshard())


def pick_blocks(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> list[nn.Module]:
    """Return the blocks with these numbers, counted from 0, or from the end if negative.

    Raises `UserError` for a block that does not exist.
    """
    for number in numbers:
        if not -len(blocks) <= number < len(blocks):
            known = f"0 to {len(blocks) - 1}, or -{len(blocks)} to -1" if blocks else "none"
            raise UserError(
                f"block {number} does not exist, so its features cannot be used; choose one of the network's blocks: {known}"
            )
    return [blocks[number] for number in numbers]


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Generator[dict[nn.Module, Any]]:
    """Yield a dictionary {block: its first output}, which is filled while the network runs inside the `with` block.

    The outputs are collected by hooks, which are removed at the end. Outputs that gradient checkpointing recomputes in the
    backward pass are therefore not collected. The hooks cost no computation.
    """
    outputs: dict[nn.Module, Any] = {}

    def keep(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(block, output)

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            stack.enter_context(block.register_forward_hook(keep))
        yield outputs
