"""Start several processes on this machine for one run, with torch's elastic launcher.

Hydra composes the configuration once, in the launching process. The started processes read it from a private temporary
folder, so all have the same configuration. The launcher forwards signals to the started processes and exits with their
status. Each started process is in a POSIX session of its own. Therefore a signal to the launcher's process group
(Ctrl-C, `timeout`) reaches the started processes only once, through the launcher.
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
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

from cdm_lightning.ends import signals
from cdm_lightning.errors import Preempted
from cdm_lightning.terminal.secrets import masked_command

GRACE = 30  # seconds: if a process has failed, the others are killed after this time
ORPHAN_CHECK = 1.0  # seconds between two checks whether the parent process still exists
CONFIG, COMMAND, LAUNCHER, SIGNALLED = "config.yaml", "command.json", "launcher", "signal"


def is_launched(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process was started by torchrun, or by SLURM as one of several tasks.

    `variables` are its environment variables.
    """
    return "RANK" in variables or int(variables.get("SLURM_NTASKS", "1")) > 1


def launch(config_text: str, processes: int, task: str, command: Sequence[str] = tuple(sys.argv)) -> int:
    """Run `task` in `processes` processes on this machine.

    Returns 0, or the exit status of the process that failed first. If a signal ended that process, the
    status is 128 + the number of the signal, as in a shell, and a message on stderr names the process.

    `config_text` is the resolved configuration as YAML. `task` is the dotted name of a function, in the form
    "module:function". Each process calls this function with the configuration. `command` is the command line of this
    process; the started processes get it as their `sys.argv`, with secrets masked.
    """
    with tempfile.TemporaryDirectory(prefix="cdm_lightning_") as name:  # only its owner can read it
        folder = Path(name)
        with handed_over(config_text, folder / CONFIG) as config, forwarded_signals(folder):
            order = {"task": task, "command": masked_command(command), "config": str(config)}
            (folder / COMMAND).write_text(json.dumps(order), encoding="utf-8")
            return run_processes(folder, processes)


@contextmanager
def handed_over(text: str, path: Path) -> Generator[Path]:
    """Yield a path at which the processes that are started in the `with` block can read `text`.

    On Linux, this is a file in memory, because `text` may hold secrets and a killed process would leave a file on the
    disk. On other systems, `text` is written to the file `path`.
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
    """Run `python *program folder` in `processes` processes.

    Returns 0 if all processes succeed. If a process fails, the others get SIGTERM, those that still run after `grace`
    seconds are killed, and the exit status of the process that failed first is returned (128 + signal if a signal ended
    it). `folder` holds the description of the task (see `main`), and small files by which the launcher and the
    processes communicate.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    (folder / LAUNCHER).write_text(str(os.getpid()))
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
        signals_to_handle="none",  # all signals are forwarded, because the processes need time to save
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
    """Forward signals that this process gets in the `with` block to the processes that have called `sign_on(folder)`.

    After a second signal, this process sends SIGKILL to those processes: they may be suspended, and a suspended process
    reacts to no other signal. If no process has called `sign_on` yet, the second signal ends this process.
    """
    first: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        is_second = bool(first) and time.monotonic() - first[0] >= signals.SAME_EVENT
        if first and not is_second:
            return
        first.append(time.monotonic())
        with suppress(OSError):
            (folder / SIGNALLED).write_text(str(number))  # for processes that sign on later
        if not is_second:
            signals.say(
                f"{signal.Signals(number).name}: passed on to the processes of this run; a second signal stops at once"
            )
        signed_on = list(folder.glob("*.pid"))
        for process in signed_on:
            with suppress(ProcessLookupError):
                os.kill(int(process.stem), signal.SIGKILL if is_second else number)
        if is_second and not signed_on:
            raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    for number, handler in before.items():
        if number != signal.SIGHUP or handler is not signal.SIG_IGN:
            signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sign_on(folder: Path) -> None:
    """Let the launcher forward its signals to this process.

    The launcher finds this process by a file in `folder` whose name contains the number of this process. Raises
    `Preempted` if the launcher has already got a signal or is dead. If the launcher dies later, this process gets
    SIGTERM.
    """
    signals.watch(silent=True)
    (folder / f"{os.getpid()}.pid").touch()
    if (folder / SIGNALLED).exists():
        raise Preempted("before it began")
    follow(int((folder / LAUNCHER).read_text()))


def follow(parent: int) -> None:
    """Let this process get SIGTERM as soon as the process `parent`, which started it, dies.

    Raises `Preempted` if `parent` is already dead.
    """
    if os.getppid() != parent:
        raise Preempted("because its launcher has died")
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str]) -> None:
    """Run the task that `launch` has described in the folder `arguments[0]`. Each started process calls this."""
    folder = Path(arguments[0])
    sign_on(folder)  # first, because the imports take seconds
    order = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    sys.argv = order["command"]
    from omegaconf import DictConfig, OmegaConf

    from cdm_lightning.config import fail, register_resolvers
    from cdm_lightning.ends.streams import make_tolerant
    from cdm_lightning.errors import UserError
    from cdm_lightning.terminal.quiet import quiet_libraries

    make_tolerant()
    signals.loading("before training")
    quiet_libraries()
    register_resolvers()
    try:
        module, _, function = order["task"].partition(":")
        getattr(importlib.import_module(module), function)(cast(DictConfig, OmegaConf.load(order["config"])))
    except Exception as error:
        if not (isinstance(error, UserError) or signals.is_saved()):
            raise
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
