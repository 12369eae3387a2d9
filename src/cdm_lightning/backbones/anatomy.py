"""The inner parts of a family's networks that an objective may use: hidden states after blocks, and the time embedding.

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
    """The part of `Backbone` that describes the parts of its networks; no network is built for it."""

    block_types: tuple[type[nn.Module], ...] = ()  # the repeated blocks: units of checkpointing and sharding
    time_embedding: str | None = None  # name of the submodule whose output (B, D) carries the time to the blocks

    @property
    def feature_width(self) -> int:
        """D of the hidden states after a block; UserError for a family that does not define it."""
        raise UserError(f"{type(self).__name__} does not define the width of its hidden features")

    @property
    def time_embedding_width(self) -> int:
        """D of the output (B, D) of `time_embedding`; UserError for a family that does not define it."""
        raise UserError(f"{type(self).__name__} does not define the width of its time embedding")

    def features_after(self, block_output: Any) -> Tensor:
        """Return the image tokens' hidden states (B, N, D) from the output of a block.

        By default this is the output itself, or the last item of a tuple (hidden states of the text, of the image).
        """
        return block_output[-1] if isinstance(block_output, tuple) else block_output

    def blocks_of(self, network: nn.Module) -> list[nn.Module]:
        """Return the blocks of a network, or of the base that a LoRA view calls, in the order of its modules."""
        return [module for module in unwrapped(network).modules() if isinstance(module, self.block_types)]

    def time_module(self, network: nn.Module) -> nn.Module:
        """Return the submodule `time_embedding` of a network, or of the base that a LoRA view calls; hooks may be added to it.

        UserError if the family or the network has none.
        """
        if self.time_embedding is None:
            raise UserError(f"{type(self).__name__} does not define where its networks embed the time")
        try:
            return unwrapped(network).get_submodule(self.time_embedding)
        except AttributeError as error:
            raise UserError(f"{type(network).__name__} has no time embedding {self.time_embedding}") from error


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the module that holds the blocks: the network itself, or the shared base that a LoRA view calls."""
    return network.shared.network if isinstance(network, RoleView) else network


def gather_for_backward(network: nn.Module, features: Tensor) -> None:
    """Make the backward pass through features of a sharded network gather the weights that are outside its blocks.

    FSDP2 gathers them when the backward pass reaches the network's output, which a loss on features alone does not use.
    """
    root = unwrapped(network)
    if isinstance(root, FSDPModule) and features.requires_grad:
        features.register_hook(lambda gradient: root.unshard())


def pick_blocks(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> list[nn.Module]:
    """Return the blocks with these numbers; negative ones count from the end. UserError for a block that does not exist."""
    for number in numbers:
        if not -len(blocks) <= number < len(blocks):
            known = f"the blocks 0 to {len(blocks) - 1}, or -{len(blocks)} to -1" if blocks else "no blocks"
            raise UserError(f"there are no features after block {number}: the network has {known}")
    return [blocks[number] for number in numbers]


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Generator[dict[nn.Module, Any]]:
    """Yield a dictionary that receives the first output of each block inside the `with`, by block.

    The hooks are removed afterwards, so that the outputs of a recomputation in the backward pass (gradient checkpointing)
    are not collected. They add no computation to a block, which would change what the backward pass recomputes.
    """
    outputs: dict[nn.Module, Any] = {}

    def keep(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(block, output)

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            stack.enter_context(block.register_forward_hook(keep))
        yield outputs
