"""Signals that ask a run to stop. They are noted on arrival, and all processes stop together after the iteration.

Lightning's own handlers communicate with other processes inside the handler, which hangs if not all of them received the
signal, and they exit without a checkpoint. The handlers of this module replace them when training starts.
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from cdm_lightning.distributed.ranks import any_of

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Handlers that note SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning before the job's time is over)."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}  # the earlier handlers: each is a function, a number or None

    def install(self) -> None:
        """Install the handlers; only in the main thread, because Python allows it nowhere else."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def asked(self) -> bool:
        """Return whether any process was asked to stop; the answer is the same on all processes."""
        return any_of(self._asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            name = signal.Signals(number).name
            print(f"{name}: saving after this iteration, then stopping", file=sys.stderr, flush=True)
        self._asked = True
