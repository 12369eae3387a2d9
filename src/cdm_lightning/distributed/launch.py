"""Start several processes on this machine for one run, with torch's elastic launcher.

Hydra composes the configuration only once, in the launching process. The processes read it from a private temporary folder,
so all of them have the same configuration and none of them runs a sweep again. Signals to the launching process are
forwarded to the processes that train, and their exit status becomes its own.
"""

import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

from cdm_lightning.terminal.secrets import masked_command

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 30  # seconds between the failure of one process and the moment when the others are killed
ORPHAN_CHECK = 2.0  # seconds between two checks whether the parent process still exists
CONFIG, COMMAND, SIGNALLED = "config.yaml", "command.json", "signal"


def is_launched(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun, or SLURM with more than one task, started this process."""
    return "RANK" in variables or int(variables.get("SLURM_NTASKS", "1")) > 1


def launch(config_text: str, processes: int, task: str, command: Sequence[str] = tuple(sys.argv)) -> int:
    """Run `task` in `processes` processes on the configuration (resolved, as YAML); return the first exit status that is not 0.

    `task` names a function of the configuration as "module:function"; each process imports it itself. The status is 0 if
    all processes succeed. If a signal ended a process, the process is named on stderr and the status is 128 + signal, as in
    a shell.
    """
    with tempfile.TemporaryDirectory(prefix="cdm_lightning_") as name:  # only its owner can read it
        folder = Path(name)
        with handed_over(config_text, folder / CONFIG) as config, forwarded_signals(folder):
            order = {"task": task, "command": masked_command(command), "config": str(config)}
            (folder / COMMAND).write_text(json.dumps(order), encoding="utf-8")
            return run_processes(folder, processes)


@contextmanager
def handed_over(text: str, path: Path) -> Generator[Path]:
    """Yield a path at which the processes started in the block can read this text, which may hold secrets.

    On Linux the text is a file in memory, because a killed process would leave one on the disk; elsewhere it is at `path`.
    """
    if not hasattr(os, "memfd_create"):
        path.write_text(text, encoding="utf-8")
        yield path
        return
    with os.fdopen(os.memfd_create(path.name), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def run_processes(
    folder: Path,
    processes: int,
    program: Sequence[str] = ("-m", "cdm_lightning.distributed.launch"),
    grace: int = GRACE,
) -> int:
    """Start `python PROGRAM FOLDER` in `processes` processes, wait for them and return the status of the first failure, or 0.

    `grace` is the time in seconds between the failure of one process and the moment when the others are killed.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes themselves print what is wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    known = "shutdown_timeout" in inspect.signature(LaunchConfig).parameters  # torch 2.11 always waits for 30 s
    shutdown: dict[str, Any] = {"shutdown_timeout": grace} if known else {}
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # all other signals are forwarded, because the processes need time to save
        **shutdown,
    )
    try:
        elastic_launch(settings, sys.executable)(*program, str(folder))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        if not (folder / SIGNALLED).exists():
            name = signal.Signals(-failure.exitcode).name
            print(f"error: process {rank} was ended by {name}; the others were stopped", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


@contextmanager
def forwarded_signals(folder: Path) -> Generator[None]:
    """Inside the block, forward signals from this process to the processes that have signed on in `folder`."""

    def forward(number: int, frame: FrameType | None) -> None:
        (folder / SIGNALLED).write_text(str(number))  # for processes that sign on later
        for process in folder.glob("*.pid"):
            try:
                os.kill(int(process.stem), number)
            except ProcessLookupError:
                continue

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sign_on(folder: Path) -> None:
    """Let this process receive the launcher's signals; exit now if one came before, and later if the launcher dies."""
    (folder / f"{os.getpid()}.pid").touch()
    if (folder / SIGNALLED).exists():
        sys.exit(128 + int((folder / SIGNALLED).read_text()))
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process by SIGTERM when its parent has died, because nothing would control it any more."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str]) -> None:
    """Run the task described in the folder `arguments[0]`, as one of the started processes."""
    folder = Path(arguments[0])
    sign_on(folder)  # before the imports, which take seconds
    order = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    sys.argv = order["command"]
    from omegaconf import DictConfig, OmegaConf

    from cdm_lightning.config import fail, register_resolvers
    from cdm_lightning.errors import Preempted, UserError
    from cdm_lightning.terminal.quiet import quiet_libraries

    quiet_libraries()
    register_resolvers()
    try:
        module, _, function = order["task"].partition(":")
        getattr(importlib.import_module(module), function)(cast(DictConfig, OmegaConf.load(order["config"])))
    except UserError as error:
        fail(error)
    except Preempted as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
