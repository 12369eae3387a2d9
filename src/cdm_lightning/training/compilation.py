"""Compile the transformer blocks of a network with torch.compile, and warn if blocks run without compilation.

A block is called in many ways: with and without gradients, with any batch size, with different LoRA adapters, and again
in the backward pass by gradient checkpointing. Dynamo, the tracer of torch.compile, compiles a variant of the block's
code for each way in which the block is called, up to a limit. Beyond the limit, the block runs without compilation,
which is slow. Gradient checkpointing runs a block twice, and even fails (`CheckpointError`) if only one of the two runs
is compiled. This module therefore sets a limit that is far above the number of variants that a run needs.
"""

import inspect
import logging
from collections.abc import Iterable

import torch
from torch import nn

VARIANTS = 64  # for each forward function; SD3 needs about 10 in a run, adapters and shards about 20
HIT = "torch._dynamo hit config."  # the beginning of dynamo's warning; its arguments: option, limit, function, reason, ...
DYNAMO = "torch._dynamo.convert_frame"  # the logger of that warning


def compile_blocks(
    network: nn.Module, block_types: tuple[type[nn.Module], ...], backend: str, limit: int = VARIANTS
) -> None:
    """Compile every block of the network with torch.compile, in place; the names of its weights stay the same.

    `block_types` are the classes of the blocks. Blocks of one class share their compiled code. This code works for
    every batch size and every number of tokens. The forward function of a block, and that of each module in a block,
    has at most `limit` compiled variants. If a function needs more variants, the further ones run without compilation,
    and a warning names the classes of the blocks that run the function.
    """
    blocks = [module for module in network.modules() if isinstance(module, block_types)]
    options: dict = {"backend": backend, "dynamic": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # torch._dynamo.config holds for one thread only, but the backward pass on a GPU runs in another thread.
        options["recompile_limit"] = limit
    else:
        torch._dynamo.config.recompile_limit = limit
    for block in blocks:
        block.compile(**options)
    _name_blocks(blocks)


class _Explained(logging.Filter):
    """A log filter that rewrites dynamo's warning about the limit of variants: it names the blocks and the option."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, set[str]] = {}  # a function as dynamo writes it -> names of the classes that run it

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the message of `record` if `record` is dynamo's warning about the limit of variants.

        The new message names the classes of the blocks and the option compute.compile_backend. Always returns True, so
        that no record is lost.
        """
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
