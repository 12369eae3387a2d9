"""Runs on several real processes with gloo, with a time limit: what hangs is a failure.

A server that has imported everything forks the processes (`train_together`), so a job takes seconds; `command` starts
the command line anew, which takes half a minute.
"""

import faulthandler
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["processes", "cdm_lightning.train", "cdm_lightning.backbones.sd3", "peft"]
FORKS.set_forkserver_preload(PRELOADED)
TIME_LIMIT = 240.0  # seconds for a job of forked processes
COMMAND_LIMIT = 580.0  # seconds for a command line, most of them for imports


class RanksFailed(Exception):
    """What the processes wrote about why they failed."""


def train_together(
    processes: int, overrides: Sequence[str], time_limit: float = TIME_LIMIT, prepare: Callable[[], None] | None = None
) -> None:
    """Train by that many processes, as torchrun would start them; each calls `prepare` (a function of a module) before.

    Raises `RanksFailed` with the tracebacks, or `TimeoutError` after `time_limit` seconds with what each rank was doing.
    """
    together(processes, _train, (list(overrides), prepare), time_limit)


def together(
    processes: int, task: Callable[..., None], arguments: tuple[Any, ...] = (), time_limit: float = TIME_LIMIT
) -> None:
    """Call `task(*arguments)` in that many processes that torch.distributed can connect."""
    port, reports = free_port(), FORKS.SimpleQueue()
    started = [
        FORKS.Process(target=_rank, args=(rank, processes, port, time_limit, reports, task, arguments), daemon=True)
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(time_limit + 10)
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        process.kill()
    said = []
    while not reports.empty():
        said.append(reports.get())
    if hanging or any("Timeout" in text for text in said):
        raise TimeoutError(f"{processes} processes took more than {time_limit} s\n" + "\n".join(said))
    if said or any(process.exitcode for process in started):
        raise RanksFailed("\n".join([*said, f"exit codes {[process.exitcode for process in started]}"]))


def fork_workers() -> None:
    """Let this process start loader workers as a command line does; else it starts a server of its own, which imports all anew."""
    multiprocessing.set_start_method("fork", force=True)


def _rank(
    rank: int, processes: int, port: int, time_limit: float, reports: Any, task: Callable, arguments: tuple
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (place | address).items()})
    fork_workers()
    faulthandler.dump_traceback_later(time_limit, exit=True)  # on stderr: what a rank that hangs was doing
    try:
        task(*arguments)
    except BaseException as error:
        reports.put(f"rank {rank}: " + "".join(traceback.format_exception(error)))
        os._exit(1)


def _train(overrides: list[str], prepare: Callable[[], None] | None) -> None:
    import torch

    from cdm_lightning import train as entry
    from cdm_lightning.config import compose
    from cdm_lightning.terminal.quiet import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    if prepare is not None:
        prepare()
    entry.train(compose(overrides))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(arguments: Sequence[str], cwd: Path, time_limit: float = COMMAND_LIMIT) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` to its end, output as text; `subprocess.TimeoutExpired` (all its processes ended) if it hangs."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def environment(**variables: str) -> dict[str, str]:
    """That of a child: this checkout's package, one thread, no GPU, no trace of another launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
