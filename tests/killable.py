"""Training runs in processes of their own, for tests that kill them: a server that has imported everything forks them."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from processes import FORKS, fork_workers, free_port

from cdm_lightning import module
from cdm_lightning.checkpoint import callback, folder, tensors
from cdm_lightning.module import CDMModule
from cdm_lightning.train import main

POINTS = ("step", "shard", "marker", "rename", "cleanup")  # where a process can be told to kill itself


@dataclass
class Run:
    """The processes of one start of a training command, and what they wrote to the terminal."""

    processes: list[BaseProcess]
    log: Path
    training: Any  # an event: the first iteration is done

    def wait_for_training(self, timeout: float = 120) -> "Run":
        """Wait until iterations are done or a process has ended."""
        end = time.monotonic() + timeout
        while not self.training.wait(0.01) and all(process.is_alive() for process in self.processes):
            assert time.monotonic() < end, self.output
        return self

    def kill(self, number: int, *ranks: int) -> "Run":
        """Send a signal to the processes of these ranks, by default to all."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)
        return self

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit codes (negative: the signal); a process that does not end in time is killed and fails the test."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [process.pid for process in self.processes if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hanging, f"hung for {timeout} s:\n{self.output}"
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        """What all processes wrote to the terminal."""
        return self.log.read_text()


def start(
    overrides: Sequence[str],
    place: Path,
    world_size: int = 1,
    prepare: Callable[..., None] | None = None,
    arguments: Sequence[Any] = (),
) -> Run:
    """Start `python -m cdm_lightning.train` with these overrides; `prepare(rank, *arguments)` runs before it in each."""
    port = free_port()
    training, log = FORKS.Event(), place / f"log_{time.monotonic_ns()}.txt"
    log.touch()
    command = [f"hydra.run.dir={place}", *overrides]
    ranks = [
        FORKS.Process(target=_train, args=(rank, world_size, port, command, log, training, prepare, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return Run(ranks, log, training)


def _train(rank, world_size, port, command, log, training, prepare, arguments) -> None:
    fork_workers()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            GROUP_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="test",
        )
    _announce(training)
    if prepare is not None:
        prepare(rank, *arguments)
    sys.argv = ["train", *command]
    main()


def _announce(training: Any) -> None:
    original = CDMModule.training_step

    def announcing(self, *batch):
        original(self, *batch)
        training.set()

    CDMModule.training_step = announcing


def die() -> None:
    """SIGKILL to oneself."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(rank: int, point: str, count: int, of_rank: int = 0) -> None:
    """Let the process kill itself when it comes to a point of saving (or to a step) for the `count`-th time."""
    if rank != of_rank:
        return
    left = [count]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    if point == "shard":  # half of a file is written
        write = tensors._Summed.write

        def half(self, content):
            if due():
                self._file.write(content[: len(content) // 2])
                self._file.flush()
                die()
            return write(self, content)

        tensors._Summed.write = half
        return
    if point == "cleanup":  # an old one has lost its name, its files are still there
        rename = os.rename

        def renaming(old, new):
            rename(old, new)
            if Path(new).name.startswith(folder.REMOVING) and due():
                die()

        os.rename = renaming
        return
    holder, name = {
        "step": (module, "lerp_parameters_"),  # between the two updates of an iteration
        "marker": (folder, "sync"),  # all is written, the folder does not have its name yet
        "rename": (callback.IterationCheckpoint, "_drop_old"),  # it has its name, old ones are still there
    }[point]
    original = getattr(holder, name)

    def dying(*values, **keywords):
        if due():
            die()
        return original(*values, **keywords)

    setattr(holder, name, dying)
