"""Find the blocks and the time embedding of a network, and read the hidden states (features) after its blocks.

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
    """The methods of `Backbone` that find the blocks, hidden states (features) and time embedding inside a network."""

    block_types: tuple[type[nn.Module], ...] = ()  # the repeated blocks: units of checkpointing and sharding
    time_embedding: str | None = None  # name of the submodule whose output (B, D) carries the time to the blocks

    @property
    def feature_width(self) -> int:
        """D, the width of the hidden states (B, N, D) after a block. Raises `UserError` if the family does not define it."""
        raise UserError(
            f"the objective needs the width of the hidden features, which {type(self).__name__} does not define; "
            "choose another objective, such as objective=cdm"
        )

    @property
    def time_embedding_width(self) -> int:
        """D, the width of the time embedding (B, D). Raises `UserError` if the family does not define it."""
        raise UserError(
            f"the objective needs the width of the time embedding, which {type(self).__name__} does not define; "
            "choose another objective, such as objective=cdm"
        )

    def features_after(self, block_output: Any) -> Tensor:
        """Return the hidden states (B, N, D) of the image tokens, given the output of a block.

        Blocks return either these states or a tuple (text states, image states). A model family whose blocks return something
        else overrides this method.
        """
        return block_output[-1] if isinstance(block_output, tuple) else block_output

    def blocks_of(self, network: nn.Module) -> list[nn.Module]:
        """Return the transformer blocks of `network`, in the order of `network.modules()`.

        For a LoRA view (LoRA adapters on a shared base network), the blocks of the base network are returned.
        """
        return [module for module in unwrapped(network).modules() if isinstance(module, self.block_types)]

    def time_module(self, network: nn.Module) -> nn.Module:
        """Return the submodule of a network that embeds the time, so that a hook can be added to it.

        For a LoRA view (LoRA adapters on a shared base network), the submodule of the base network is returned. Raises
        `UserError` if the family's attribute `time_embedding` is None, or if the network has no submodule of this name.
        """
        if self.time_embedding is None:
            raise UserError(
                f"the objective adds an input to the network's time embedding, but {type(self).__name__} does not name the "
                "module that computes this embedding; choose another objective, such as objective=cdm"
            )
        try:
            return unwrapped(network).get_submodule(self.time_embedding)
        except AttributeError as error:
            raise UserError(
                f"{type(network).__name__} has no module {self.time_embedding}, whose output the objective needs as the time "
                "embedding; choose another objective, such as objective=cdm"
            ) from error


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the base network of a LoRA view (LoRA adapters on a shared base network), and other networks unchanged."""
    return network.shared.network if isinstance(network, RoleView) else network


def gather_for_backward(network: nn.Module, features: Tensor) -> None:
    """Let FSDP2 gather the weights of `network` that the backward pass of a loss on `features` needs.

    `features` are hidden states after a block. FSDP2 gathers the weights that lie outside all blocks when a backward
    pass reaches the network's output. The backward pass of a loss on `features` alone never reaches this output.
    Therefore this function adds a hook to `features` that gathers these weights. If FSDP2 does not shard the network,
    nothing is done.
    """
    root = unwrapped(network)
    if isinstance(root, FSDPModule) and features.requires_grad:
        features.register_hook(lambda gradient: root.unshard())


def pick_blocks(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> list[nn.Module]:
    """Return the blocks with the indices `numbers`. Negative indices count from the end.

    Raises `UserError` for an index out of range.
    """
    for number in numbers:
        if not -len(blocks) <= number < len(blocks):
            known = (
                f"0 to {len(blocks) - 1}, or -{len(blocks)} to -1" if blocks else "none, so choose another objective"
            )
            raise UserError(
                f"block {number} does not exist, so the objective cannot read its features; set objective.feature_blocks to "
                f"some of the network's blocks: {known}"
            )
    return [blocks[number] for number in numbers]


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Generator[dict[nn.Module, Any]]:
    """Yield a dictionary that maps each of `blocks` to the output of its first call inside the `with` block.

    Forward hooks fill the dictionary while the network runs. They are removed at the end of the `with` block. Therefore
    the outputs that gradient checkpointing recomputes in a later backward pass are not collected.
    """
    outputs: dict[nn.Module, Any] = {}

    def keep(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(block, output)

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            stack.enter_context(block.register_forward_hook(keep))
        yield outputs
