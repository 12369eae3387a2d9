"""Signals that ask a run to stop: one rule from its first second to its last.

The first signal saves what there is and ends the process with exit code 75. What that takes depends on the phase of the
process (`Phase`), which the code that enters one sets by `loading`, `training` and `finished`:

- While libraries are imported there is nothing to save: the process exits in the handler.
- While data and networks are loaded, and after training while the student is evaluated and exported, everything that exists
  is stored already: the handler raises `Preempted`, and the code that is interrupted cleans up.
- In training the signal is noted, and all processes stop together after the iteration or the validation batch.
- When all is saved, a further signal exits at once with 75.

A second signal stops at once, without saving. Signals within `SAME_EVENT` seconds count as one, because the programs that
stop a run often send several: `timeout` signals the process and its group, systemd adds SIGHUP to SIGTERM.
"""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from enum import Enum
from types import FrameType
from typing import Any

from cdm_lightning.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
SAME_EVENT = 0.5  # seconds
AGAIN = "run the same command again to continue"


class Phase(Enum):
    """What a process is doing, which decides what the first signal does (the value in words); see the top of this file."""

    IMPORTING = "exit in the handler"
    LOADING = "raise Preempted: everything is stored"
    TRAINING = "note it: the iteration has to be finished and saved"
    FINISHED = "nothing: the run is over"


class _State:
    """The state of the one main thread that Python runs handlers in."""

    def __init__(self) -> None:
        self.process = 0  # the process that installed the handlers; 0: none
        self.phase, self.where = Phase.IMPORTING, "before the run began"
        self.first: signal.Signals | None = None
        self.time = 0.0  # of the first signal, in seconds
        self.saved = self.is_waiting = self.is_silent = False


_state = _State()


def watch(silent: bool = False) -> bool:
    """Install the handlers of all `SIGNALS`; return False if this process has them already or this is not the main thread.

    With `silent`, no line is printed for a signal outside training: the launcher of the process prints it. The launcher
    also sends SIGTERM when another process has failed, and a line would then say wrongly that somebody has stopped the run.
    SIGHUP stays ignored if it was ignored before, as `nohup` does.
    """
    if _state.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        return False
    _state.__init__()
    _state.process, _state.is_silent = os.getpid(), silent
    _install()
    return True


def _install() -> None:
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


@contextmanager
def watched() -> Generator[None]:
    """Install the handlers (`watch`) inside the block, and afterwards the earlier ones; nothing if they are installed already."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    installed = watch()
    try:
        yield
    finally:
        if installed:
            _state.process = 0
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def loading(where: str) -> None:
    """Enter the phase in which nothing is left to be saved: the first signal raises `Preempted` where the process is.

    A signal that has come already raises it at once, unless what it asked for is saved. `where` completes the message "SIGNAL:
    stopped ...", for example "before training".
    """
    _enter(Phase.LOADING, where)


def training() -> None:
    """Enter the phase of training: the first signal only makes `is_asked` true. Raise `Preempted` if one has come already."""
    _enter(Phase.TRAINING, "in training")
    if _state.process == os.getpid():
        _install()  # libraries may have replaced the handlers


def failing() -> None:
    """Forget an earlier signal, because an error is ending the process and nothing is left to save: a new one raises `Preempted`."""
    _state.phase, _state.where, _state.first = Phase.LOADING, "after an error", None


def finished() -> None:
    """Enter the last phase, in which the process has nothing left to do: the first signal is without effect."""
    _state.phase = Phase.FINISHED


def saved() -> None:
    """Note that what the first signal asked to save is saved: a further signal ends the process at once with exit code 75."""
    _state.saved = True


def is_saved() -> bool:
    """Return whether `saved` was called, or `Preempted` was raised because nothing had to be saved."""
    return _state.saved


def is_asked() -> bool:
    """Return whether one of `SIGNALS` has come, which asks this process to stop."""
    return _state.first is not None


@contextmanager
def waiting() -> Generator[None]:
    """Let the first signal raise `Preempted` inside the block also in training, because no iteration is half done in it.

    A signal that came earlier in training raises it at the start of the block.
    """
    _state.is_waiting = True
    try:
        if _state.first is not None and _state.phase is Phase.TRAINING:
            raise Preempted("in training")
        yield
    finally:
        _state.is_waiting = False


@contextmanager
def held() -> Generator[None]:
    """Block `SIGNALS` inside the block; this process gets them after it, and processes started inside the block never do.

    New processes inherit the mask of blocked signals, so there is no moment in which one of them could be ended by a signal
    that goes to the whole process group.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _enter(phase: Phase, where: str) -> None:
    _state.phase, _state.where = phase, where
    if _state.first is not None and not _state.saved:
        _stop(where)


def _stop(where: str) -> None:
    _state.saved = True
    _say_stopped(where)
    raise Preempted(where)


def _say_stopped(where: str) -> None:
    if not _state.is_silent:
        say(f"{_name()}: stopped {where}; {AGAIN}")


def _handle(number: int, frame: FrameType | None) -> Any:
    if os.getpid() != _state.process:
        return  # a process that was forked; it gets its orders from the one that forked it
    if _state.first is not None:
        if time.monotonic() - _state.time >= SAME_EVENT:
            _end_at_once(number)
        return
    _state.first, _state.time = signal.Signals(number), time.monotonic()
    if _state.phase is Phase.IMPORTING:
        _say_stopped(_state.where)
        os._exit(Preempted.exit_code)
    if _state.phase is Phase.LOADING:
        _stop(_state.where)
    if _state.phase is Phase.TRAINING:
        say(f"{_name()}: saving after this iteration, then stopping (a second signal stops at once)")
        if _state.is_waiting:
            raise Preempted("in training")


def _end_at_once(number: int) -> None:
    """End the process by this signal, or with 75 if all is saved."""
    if _state.saved:
        os._exit(Preempted.exit_code)
    say(f"{signal.Signals(number).name}: a second signal, stopped at once without saving")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container has no default handlers


def _name() -> str:
    return _state.first.name if _state.first is not None else "signal"


def say(text: str) -> None:
    """Write a line on stderr, from the first process of a run only.

    Python's buffers are left out, because the signal may have come while they were in use.
    """
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0):
        return  # the first process says it
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
