"""Compile the blocks of a network with torch.compile, so that every call of a run stays compiled.

One block is called in many ways: with and without gradients, by a batch of any size, by frozen and by trained networks, with
several LoRA adapters, and once more in the backward pass by gradient checkpointing. Dynamo, the tracer of torch.compile, compiles
a variant for each way. Beyond a limit of variants it runs what is new without compiling it, which is slow; and where gradient
checkpointing then recomputes without compilation what was compiled, or the reverse, torch raises `CheckpointError`. The limit here
is therefore far above what a run needs.
"""

import inspect
import logging
from collections.abc import Iterable

import torch
from torch import nn

VARIANTS = 64  # for each forward function; SD3 needs about 10 in a run, adapters and shards about 20
HIT = "torch._dynamo hit config."  # how dynamo's warning begins; its arguments follow in this order: limit, value, function
DYNAMO = "torch._dynamo.convert_frame"  # the logger of that warning


def compile_blocks(
    network: nn.Module, block_types: tuple[type[nn.Module], ...], backend: str, limit: int = VARIANTS
) -> None:
    """Compile every block of the network with torch.compile, in place; the names of its weights do not change.

    `block_types` are the classes of the blocks. Blocks that are alike share their compiled code. The batch size and the number
    of tokens are symbols in that code, so that other sizes do not compile again. If one forward function needs more than `limit`
    variants, a warning names the blocks that run it: from then on, some of their calls are not compiled.
    """
    blocks = [module for module in network.modules() if isinstance(module, block_types)]
    options: dict = {"backend": backend, "dynamic": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # Configuration is of one thread only, and a GPU's backward pass, with its recomputations, runs in another.
        options["recompile_limit"] = limit
    else:
        torch._dynamo.config.recompile_limit = limit
    for block in blocks:
        block.compile(**options)
    _name_blocks(blocks)


class _Explained(logging.Filter):
    """Tells in dynamo's warning which blocks are no longer compiled, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, set[str]] = {}  # a function as dynamo writes it -> names of the classes that run it

    def filter(self, record: logging.LogRecord) -> bool:
        """Give a record that says that the limit is reached the words of this project; keep every record."""
        if isinstance(record.msg, str) and record.msg.startswith(HIT) and isinstance(record.args, tuple):
            _, limit, function, reason, *_ = record.args
            names = ", ".join(sorted(self.blocks.get(str(function), {str(function)})))
            record.msg = (
                "compute.compile_backend: %s has reached the limit of %s compiled variants, and further ones run without "
                "compilation, which is slow (the last difference: %s); please report it with the command of this run"
            )
            record.args = (names, limit, str(reason).strip())
        return True


_explained = _Explained()


def _name_blocks(blocks: Iterable[nn.Module]) -> None:
    for block in blocks:
        for module in block.modules():
            code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
            if code is not None:
                function = f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})"
                name, inner = type(block).__name__, type(module).__name__
                _explained.blocks.setdefault(function, set()).add(name if module is block else f"{inner} in {name}")
    logger = logging.getLogger(DYNAMO)
    if _explained not in logger.filters:
        logger.addFilter(_explained)
