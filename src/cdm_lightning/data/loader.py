"""A `DataLoader` whose workers ignore signals to the run, and whose wait for a batch has a limit."""

import atexit
import ctypes
import multiprocessing.util  # noqa: F401  see `_kill_all`
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import active_children
from typing import Any

from torch.utils.data import DataLoader

from cdm_lightning.ends import signals
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

PR_SET_PDEATHSIG = 1  # of prctl(2)
PATIENCE = 5  # seconds that a killed process has to disappear
_started: set[Any] = set()  # all workers of this process


class SteadyLoader(DataLoader):
    """A `DataLoader` for a run that signals such as SIGTERM may stop; `values` and `options` are those of `DataLoader`.

    The workers ignore these signals, so that the training process decides when they end; when it ends, they are killed, even
    suspended ones. With `is_alone` (the run has one process), a signal ends the wait for a batch at once. `patience` is the
    longest wait for a batch in seconds, 0 for no limit. It is used instead of torch's `timeout`, which does not cover the
    transfer of a tensor from a worker.
    """

    def __init__(self, *values: Any, is_alone: bool = True, patience: float = 0.0, **options: Any) -> None:
        super().__init__(*values, worker_init_fn=_end_with_parent, **options)
        self.is_alone, self.patience = is_alone, patience
        self._workers: set[Any] = set()

    def __iter__(self) -> Any:
        """Return an iterator of batches; it raises `UserError` if a worker dies or if no batch comes within `patience` seconds."""
        before = set(active_children())
        with signals.held():
            batches = super().__iter__()
        started = set(active_children()) - before
        self._workers |= started
        _started.update(started)
        return _Batches(batches, self)

    def kill_workers(self) -> None:
        """Kill the workers of this loader that are still alive after its shutdown, because they are suspended or hang."""
        kill(self._workers)
        _started.difference_update(self._workers)
        self._workers = set()


class _Batches(Iterator):
    """The batches of a loader."""

    def __init__(self, batches: Iterator, loader: SteadyLoader) -> None:
        self._batches, self._loader = batches, loader

    def __next__(self) -> Any:
        try:
            with signals.waiting() if self._loader.is_alone else nullcontext(), _at_most(self._loader.patience):
                return next(self._batches)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise UserError(worker_failure(error)) from error
        except (ConnectionError, EOFError) as error:  # the worker died while it passed on a batch, before torch noticed
            if not self._loader.num_workers:
                raise
            raise UserError(worker_failure(error)) from error


@contextmanager
def _at_most(seconds: float) -> Generator[None]:
    """Raise `UserError` in the block after this time (0: never); the main thread alone can be interrupted like this."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise UserError(
            f"the loader workers delivered no batch for {seconds:g} seconds (data.worker_timeout): they hang or are suspended, "
            f"or read from a file system that does not answer; {signals.AGAIN}"
        )

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kill(workers: Iterable[Any]) -> None:
    """Kill these worker processes, and wait up to `PATIENCE` seconds for each to disappear."""
    for worker in workers:
        with suppress(ValueError):  # it has been closed
            if worker.is_alive():
                worker.kill()
                worker.join(PATIENCE)


@atexit.register  # after the import of multiprocessing.util, so before its own: that one waits for all workers to end
def _kill_all() -> None:
    if _started:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
        kill(_started)


def worker_failure(error: BaseException) -> str:
    """Return the text of the UserError for an error that reading from a loader raised because a worker has died."""
    if isinstance(error, RuntimeError):
        return f"{first_line(error)} (out of memory?); {signals.AGAIN}"
    return f"DataLoader worker exited unexpectedly ({first_line(error)}; out of memory?); {signals.AGAIN}"


def _end_with_parent(worker: int) -> None:
    """Ignore signals, and let Linux kill this process when its parent ends; elsewhere torch's workers look for it themselves.

    A worker that another process forked (`spawn`, `forkserver`) has not inherited the mask of signals that are held.
    """
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
