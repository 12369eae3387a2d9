"""What an objective may use inside a family's networks: the hidden states (features) after blocks, and the time embedding.

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
    """The part of `Backbone` that says where blocks, features and time embedding are in its networks; it builds no network."""

    block_types: tuple[type[nn.Module], ...] = ()  # the repeated blocks: units of checkpointing and sharding
    time_embedding: str | None = None  # name of the submodule whose output (B, D) carries the time to the blocks

    @property
    def feature_width(self) -> int:
        """D, the width of the hidden states (B, N, D) after a block; UserError for a family that does not define it."""
        raise UserError(
            f"{type(self).__name__} does not define the width of its hidden features; choose another objective"
        )

    @property
    def time_embedding_width(self) -> int:
        """D, the width of the output (B, D) of the submodule `time_embedding`; UserError for a family that does not define it."""
        raise UserError(
            f"{type(self).__name__} does not define the width of its time embedding; choose another objective"
        )

    def features_after(self, block_output: Any) -> Tensor:
        """Return the hidden states (B, N, D) of the image tokens, given what a block returned.

        By default this is the output itself, or the last item of a tuple: blocks return (text states, image states).
        """
        return block_output[-1] if isinstance(block_output, tuple) else block_output

    def blocks_of(self, network: nn.Module) -> list[nn.Module]:
        """Return the repeated blocks of a network in the order of its modules; for a LoRA view, the blocks of its base network."""
        return [module for module in unwrapped(network).modules() if isinstance(module, self.block_types)]

    def time_module(self, network: nn.Module) -> nn.Module:
        """Return the submodule of a network that embeds the time, to add hooks to; for a LoRA view, that of its base network.

        UserError if the family does not name one (`time_embedding`) or this network lacks it.
        """
        if self.time_embedding is None:
            raise UserError(
                f"the objective adds an input to the time embedding of the networks, which {type(self).__name__} does not name; "
                "choose another objective"
            )
        try:
            return unwrapped(network).get_submodule(self.time_embedding)
        except AttributeError as error:
            raise UserError(
                f"{type(network).__name__} has no time embedding {self.time_embedding}; choose another objective"
            ) from error


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network itself, or for a view of a base with LoRA adapters (`lora.views`) that base, which has the blocks."""
    return network.shared.network if isinstance(network, RoleView) else network


def gather_for_backward(network: nn.Module, features: Tensor) -> None:
    """Let a loss on `features` of a network that FSDP2 shards be differentiated: its backward pass gathers the root weights.

    FSDP2 gathers the weights outside the blocks when the backward pass reaches the network's output, which a loss on features
    alone does not use. Without sharding, this does nothing.
    """
    root = unwrapped(network)
    if isinstance(root, FSDPModule) and features.requires_grad:
        features.register_hook(lambda gradient: root.unshard())


def pick_blocks(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> list[nn.Module]:
    """Return the blocks with these numbers: from 0, or negative from the end. UserError for a block that does not exist."""
    for number in numbers:
        if not -len(blocks) <= number < len(blocks):
            known = f"the blocks 0 to {len(blocks) - 1}, or -{len(blocks)} to -1" if blocks else "no blocks"
            raise UserError(f"there are no features after block {number}: the network has {known}")
    return [blocks[number] for number in numbers]


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Generator[dict[nn.Module, Any]]:
    """Yield a dictionary {block: its first output}, which is filled while the network runs inside the `with`.

    The hooks that fill it are removed at the end of the `with`, so outputs that gradient checkpointing computes again in
    the backward pass are not collected. They add no computation to a block.
    """
    outputs: dict[nn.Module, Any] = {}

    def keep(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(block, output)

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            stack.enter_context(block.register_forward_hook(keep))
        yield outputs
