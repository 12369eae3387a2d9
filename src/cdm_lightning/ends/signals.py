"""Signals that ask a run to stop. After the first one the run is saved if needed, and the process exits with code 75.

What the first signal does depends on the phase of the process. The functions `loading`, `training` and `finished` begin
a phase.

- While libraries are imported, the process exits in the signal handler, since there is nothing to save.
- While data and networks are loaded, and while the student is evaluated and exported after training, everything is
  saved already. The handler raises `Preempted`, and the interrupted code cleans up.
- In training, the handler only records the signal. After the current iteration or validation batch, all processes save
  the run and stop together.
- When the run is over, the first signal has no effect.

A second signal ends the process at once, without saving. If everything is saved already, the exit code is 75; otherwise
the signal itself ends the process. Signals within `SAME_EVENT` seconds count as one, because the programs that stop a
run often send several: `timeout` signals the process and its group, and systemd sends SIGTERM and SIGHUP.
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
    """The phase of a process, which decides what the first signal does.

    The value of each phase says in words what the signal does.
    """

    IMPORTING = "exit in the handler"
    LOADING = "raise Preempted: everything is stored"
    TRAINING = "note it: the iteration has to be finished and saved"
    FINISHED = "nothing: the run is over"


class _State:
    """The state of the main thread, in which Python runs signal handlers."""

    def __init__(self) -> None:
        self.process = 0  # the process that installed the handlers; 0: none
        self.phase, self.where = Phase.IMPORTING, "before the run began"
        self.first: signal.Signals | None = None
        self.time = 0.0  # of the first signal, in seconds
        self.saved = self.is_waiting = self.is_silent = self.is_held = False
        self.held_back: list[int] = []  # signals that came while `is_held`


_state = _State()


def watch(silent: bool = False) -> bool:
    """Install a handler for all `SIGNALS`, and return True.

    If this process has the handlers already, or if this is not the main thread, nothing is done and the result is
    False. SIGHUP stays ignored if it was ignored before, for example by `nohup`.

    With `silent`, this process does not print that it was stopped. Use it for processes that a launcher started. The
    launcher itself reports a signal that it forwards. If one process fails, the launcher stops the others by SIGTERM,
    and they must not report this SIGTERM as if the user had stopped the run.
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
    """Install the handlers (see `watch`) at the start of the `with` block, and restore the earlier handlers at its end.

    If the handlers are installed already, nothing changes.
    """
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
    """Enter a phase in which nothing needs to be saved: the first signal raises `Preempted` at once.

    If a signal came earlier, this call raises `Preempted`, unless the run has already been saved because of that signal. `where`
    completes the message "SIGNAL: stopped ...", as in "before training".
    """
    _enter(Phase.LOADING, where)


def training() -> None:
    """Enter the training phase, in which the first signal has one effect only: `is_asked` returns True.

    Raises `Preempted` if a signal came earlier.
    """
    _enter(Phase.TRAINING, "in training")
    if _state.process == os.getpid():
        _install()  # libraries may have replaced the handlers


def failing() -> None:
    """Enter the phase after an error, in which nothing is saved any more.

    An earlier signal is forgotten, and a new signal raises `Preempted`.
    """
    _state.phase, _state.where, _state.first = Phase.LOADING, "after an error", None


def finished() -> None:
    """Enter the last phase, in which the run is over and the first signal has no effect."""
    _state.phase = Phase.FINISHED


def saved() -> None:
    """Record that the run has been saved in response to the first signal.

    Another signal then ends the process at once, with exit code 75.
    """
    _state.saved = True


def is_saved() -> bool:
    """Return whether a signal has come and the run needs no further save.

    It needs none if `saved` was called, or if everything was saved already when the signal came.
    """
    return _state.saved and _state.process == os.getpid()


def is_asked() -> bool:
    """Return whether one of the `SIGNALS` has asked this process to stop."""
    return _state.first is not None


@contextmanager
def waiting() -> Generator[None]:
    """Let the first signal raise `Preempted` inside the `with` block even in training.

    Use it for a block that waits, such as for the next batch, so that a signal ends the wait. The block must lie
    between two iterations, because an iteration must not be interrupted. If a signal came earlier in training,
    `Preempted` is raised before the block.
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
    """Hold back all `SIGNALS` until the end of the `with` block. Processes that are started in it never receive them.

    The calling thread masks the signals, and new processes inherit this mask. Therefore a signal to the whole process
    group cannot end a new process, not even while it starts. Other threads do not mask the signals; if one receives a
    signal, the handler stores it until the end of the `with` block. All signals that came in the `with` block are then
    handled as one signal.
    """
    before, outer = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS), _state.is_held
    _state.is_held = True
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _state.is_held = outer
        if _state.held_back and not outer:
            first = _state.held_back[0]
            _state.held_back.clear()
            _handle(first, None)


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
        return  # this is a forked child; its parent tells it when to stop
    if _state.is_held:
        _state.held_back.append(number)
        return
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
    """End the process by the signal `number`, or with exit code 75 if everything is saved."""
    if _state.saved:
        os._exit(Preempted.exit_code)
    say(f"{signal.Signals(number).name}: this is the second signal; stopped at once, without saving")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container has no default handlers


def _name() -> str:
    return _state.first.name if _state.first is not None else "signal"


def say(text: str) -> None:
    """Write a line on stderr. Only the first process of a run writes it.

    The line bypasses Python's buffers, because signal handlers call this function, and a handler may have interrupted
    code that uses these buffers.
    """
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0):
        return  # the first process prints it
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
