"""What the processes of a run tell each other; with one process all of these return what they are given."""

from typing import Any

import torch
import torch.distributed as dist


def is_spread() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's place, from 0."""
    return dist.get_rank() if is_spread() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_spread() else 1


def gather(value: Any) -> list[Any]:
    """The value of each process, for all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The first process's value, for all of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def largest(count: int) -> int:
    """The largest of all processes' counts; a tensor on the CPU carries it, so no graphics card is waited for."""
    if world_size() == 1:
        return count
    shared = torch.tensor(count, device="cpu")
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def any_of(flag: bool) -> bool:
    """Whether it is true on any process."""
    return bool(largest(int(flag)))


def agree(error: OSError | None) -> None:
    """OSError on all processes if any of them met one."""
    texts = gather(None if error is None else str(error.strerror or error))
    found = next((text for text in texts if text is not None), None)
    if found is not None:
        raise OSError(found) from error
