"""Signals that ask a run to stop: noted when they come, obeyed by all processes together after the iteration.

Lightning's own handlers talk to other processes inside the handler, which hangs if not all of them got the signal, and
leave without a checkpoint. These replace them from the start of training on.
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from cdm_lightning.ranks import any_of

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Notes SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning before its time is over)."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}  # a function, a number or None

    def install(self) -> None:
        """Take the signals over; in the main thread alone, as Python wants it."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        """Give them back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def asked(self) -> bool:
        """Whether any process was asked to stop; the same answer on all of them."""
        return any_of(self._asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            name = signal.Signals(number).name
            print(f"{name}: saving after this iteration, then stopping", file=sys.stderr, flush=True)
        self._asked = True
