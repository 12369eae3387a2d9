"""Several processes on this machine for one run, by torch's elastic launcher, once Hydra has composed the configuration.

The configuration is handed over in a private temporary folder, so all processes have the same one and none runs a sweep
again. Signals to this process go on to those that train; their exit status is this process's.
"""

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
from typing import cast

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 30  # seconds between the end of one process and that of the others by force
ORPHAN_CHECK = 2.0  # seconds
CONFIG, COMMAND, SIGNALLED = "config.yaml", "command.json", "signal"


def is_launched(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or SLURM started this process as one of several, or as the one that there shall be."""
    return "RANK" in variables or int(variables.get("SLURM_NTASKS", "1")) > 1


def launch(config_text: str, processes: int, command: Sequence[str] = tuple(sys.argv)) -> int:
    """Train by that many processes on the configuration (resolved, YAML); the exit status of the first that failed, or 0.

    A process that a signal ended is named on stderr and counts as status 128 + signal, as in a shell.
    """
    with tempfile.TemporaryDirectory(prefix="cdm_lightning_") as name:  # readable by its owner alone
        folder = Path(name)
        (folder / CONFIG).write_text(config_text, encoding="utf-8")
        (folder / COMMAND).write_text(json.dumps(list(command)), encoding="utf-8")
        with forwarded_signals(folder):
            return run_processes(folder, processes)


def run_processes(
    folder: Path, processes: int, program: Sequence[str] = ("-m", "cdm_lightning.launch"), grace: int = GRACE
) -> int:
    """Start `python PROGRAM FOLDER` in that many processes, wait for them, and return the status of the first that failed.

    `grace` are the seconds between the failure of one and the end of the others by force.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what is wrong
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # the others are forwarded: those who train take their time to save
        shutdown_timeout=grace,
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
    """Inside the block signals to this process go to the processes that signed on in `folder`."""

    def forward(number: int, frame: FrameType | None) -> None:
        (folder / SIGNALLED).write_text(str(number))  # for those that have yet to sign on
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
    """Let signals to the launcher reach this process; end at once if one has come already, and later if the launcher dies."""
    (folder / f"{os.getpid()}.pid").touch()
    if (folder / SIGNALLED).exists():
        sys.exit(128 + int((folder / SIGNALLED).read_text()))
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process, as by SIGTERM, when its parent is gone: nobody would know of it any more."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str]) -> None:
    """One of the processes: train on the task in the folder that is named."""
    folder = Path(arguments[0])
    sign_on(folder)  # before the imports, which take seconds
    sys.argv = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    from omegaconf import DictConfig, OmegaConf

    from cdm_lightning.config import fail, register_resolvers
    from cdm_lightning.errors import Preempted, UserError
    from cdm_lightning.quiet import quiet_libraries
    from cdm_lightning.train import train

    quiet_libraries()
    register_resolvers()
    try:
        train(cast(DictConfig, OmegaConf.load(folder / CONFIG)))
    except UserError as error:
        fail(error)
    except Preempted as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
