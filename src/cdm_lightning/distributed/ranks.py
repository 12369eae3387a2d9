"""Communication between the processes of a run. In a run with one process, the functions work without torch's process group."""

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cdm_lightning.errors import UserError

PATIENCE = timedelta(
    days=7
)  # until a process that does not answer counts as lost; one that has ended is noticed at once
BLAMED_WAIT = 5.0  # seconds in which a process that has failed says why, and the launcher ends the others


@contextmanager
def connected(what: str) -> "Generator[None]":
    """Connect the processes that torchrun has started, inside the `with` block, by gloo. Without torchrun, do nothing.

    Raises `UserError` if SLURM has started several processes without torchrun, and if another process ends inside the
    block. `what` is a word for messages, such as "evaluation".
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserError(f"SLURM has started several processes of this {what}; start it with torchrun, or as one task")
    if is_spread() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
        dist.barrier()
    except Exception as error:
        if not lost_process(error):
            raise
        time.sleep(BLAMED_WAIT)
        raise UserError(f"another process of this {what} has ended; run the same command again to continue") from error
    finally:
        dist.destroy_process_group()


def is_spread() -> bool:
    """Return whether torch's process group is initialised, so that processes can communicate."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if is_spread() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_spread() else 1


def gather(value: Any) -> list[Any]:
    """Return a list of the values that all processes pass, ordered by rank. All processes must call this."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def to_first(value: Any) -> list[Any] | None:
    """Return to the first process a list of the values that all processes pass, ordered by rank, and None to the others.

    All processes must call this. Unlike `gather`, it needs memory for all values in one process only.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def from_first(value: Any) -> Any:
    """Return to every process the value that the first process passes. All processes must call this."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def largest(count: int) -> int:
    """Return the largest `count` of all processes. All processes must call this.

    The counts are exchanged on the CPU, so no process has to wait for work on its GPU.
    """
    if world_size() == 1:
        return count
    shared = torch.tensor(count, device="cpu")
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def any_of(flag: bool) -> bool:
    """Return whether `flag` is True in any process. All processes must call this."""
    return bool(largest(int(flag)))


def agree(error: OSError | None) -> None:
    """Raise OSError in all processes if one of them passes an error. All processes must call this.

    The raised error has the text of the error from the process with the lowest rank.
    """
    texts = gather(None if error is None else str(error.strerror or error))
    found = next((text for text in texts if text is not None), None)
    if found is not None:
        raise OSError(found) from error


def lost_process(error: BaseException) -> bool:
    """Return whether torch's communication raised `error` because another process has ended or does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
