"""Where an objective may reach into a family's networks: the hidden states after their blocks, and their time embedding.

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
    """What `Backbone` says about the parts of its networks; all of it is known without building a network."""

    block_types: tuple[type[nn.Module], ...] = ()  # the repeated blocks: units of checkpointing and of sharding
    time_embedding: str | None = None  # name of the submodule whose output (B, D) tells the blocks the time

    @property
    def feature_width(self) -> int:
        """D of the hidden states after a block; UserError for a family that does not tell it."""
        raise UserError(f"{type(self).__name__} does not tell the width of its hidden features")

    @property
    def time_embedding_width(self) -> int:
        """D of the output (B, D) of `time_embedding`; UserError for a family that does not tell it."""
        raise UserError(f"{type(self).__name__} does not tell the width of its time embedding")

    def features_after(self, block_output: Any) -> Tensor:
        """The image tokens' hidden states (B, N, D) in what a block returned.

        By default that is the output itself, or the last part of a tuple (hidden states of the text, of the image).
        """
        return block_output[-1] if isinstance(block_output, tuple) else block_output

    def blocks_of(self, network: nn.Module) -> list[nn.Module]:
        """The blocks of a network of this family, or of the base that a LoRA view calls, in the order of its modules."""
        return [module for module in unwrapped(network).modules() if isinstance(module, self.block_types)]

    def time_module(self, network: nn.Module) -> nn.Module:
        """The submodule `time_embedding` of a network, or of the base that a LoRA view calls, for hooks on its output.

        UserError if the family or the network has none.
        """
        if self.time_embedding is None:
            raise UserError(f"{type(self).__name__} does not tell where its networks embed the time")
        try:
            return unwrapped(network).get_submodule(self.time_embedding)
        except AttributeError as error:
            raise UserError(f"{type(network).__name__} has no time embedding {self.time_embedding}") from error


def unwrapped(network: nn.Module) -> nn.Module:
    """The module that holds the blocks: the network itself, or the shared base that a LoRA view calls."""
    return network.shared.network if isinstance(network, RoleView) else network


def gather_for_backward(network: nn.Module, features: Tensor) -> None:
    """Let the backward pass through features of a sharded network gather the weights outside of its blocks.

    FSDP2 does so when it comes to what the network returned, which a loss of features alone does not use.
    """
    root = unwrapped(network)
    if isinstance(root, FSDPModule) and features.requires_grad:
        features.register_hook(lambda gradient: root.unshard())


def pick_blocks(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> list[nn.Module]:
    """The blocks with these numbers, negative ones counted from the end; UserError for a number that there is not."""
    for number in numbers:
        if not -len(blocks) <= number < len(blocks):
            known = f"the blocks 0 to {len(blocks) - 1}, or -{len(blocks)} to -1" if blocks else "no blocks"
            raise UserError(f"there are no features after block {number}: the network has {known}")
    return [blocks[number] for number in numbers]


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Generator[dict[nn.Module, Any]]:
    """A dictionary that fills with what each of the blocks returns first inside the `with`, by block.

    Nothing is left on the blocks afterwards, so that what gradient checkpointing runs again in the backward pass is not
    collected, and no computation is added to a block, which would change what the backward pass has to recompute.
    """
    outputs: dict[nn.Module, Any] = {}

    def keep(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(block, output)

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            stack.enter_context(block.register_forward_hook(keep))
        yield outputs
