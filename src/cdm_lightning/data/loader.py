"""A `DataLoader` whose workers ignore signals, and which waits only a limited time for a batch."""

import atexit
import ctypes
import multiprocessing.util  # noqa: F401  see `_kill_all`
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import active_children, parent_process
from typing import Any

from torch.utils.data import DataLoader

from cdm_lightning.ends import signals
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

PR_SET_PDEATHSIG = 1  # of prctl(2)
PATIENCE = 5  # seconds that a killed process has to disappear
_started: set[Any] = set()  # all workers of this process


class SteadyLoader(DataLoader):
    """A `DataLoader` for runs that a signal such as SIGTERM may stop.

    The training process decides when its workers end, so the workers ignore such signals. When the training process
    ends, all its workers are killed, even suspended ones.

    `patience` is the longest time in seconds that the training process waits for a batch; 0 means no limit. It is used
    because torch's option `timeout` does not cover the transfer of a tensor from a worker. `is_alone` says that the run
    has a single process, so that a signal may end the wait for a batch at once. `values` and `options` are the
    arguments of `DataLoader`.
    """

    def __init__(self, *values: Any, is_alone: bool = True, patience: float = 0.0, **options: Any) -> None:
        super().__init__(*values, worker_init_fn=_end_with_parent, **options)
        self.is_alone, self.patience = is_alone, patience
        self._workers: set[Any] = set()

    def __iter__(self) -> Any:
        """Return an iterator over the batches.

        It raises `UserError` if a worker dies, or if no batch arrives within `patience` seconds.
        """
        before = set(active_children())
        with signals.held():  # until the workers are known, because a signal ends the run as soon as it is delivered
            try:
                batches = super().__iter__()
            finally:
                started = set(active_children()) - before
                self._workers |= started
                _started.update(started)
        return _Batches(batches, self)

    def kill_workers(self) -> None:
        """Kill the workers of this loader that still run after the loader's shutdown.

        Such workers hang or are suspended.
        """
        kill(self._workers)
        _started.difference_update(self._workers)
        self._workers = set()


class _Batches(Iterator):
    """An iterator over the batches of a loader."""

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
    """Raise `UserError` inside the block after this many seconds; 0 means never. This works in the main thread only."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise UserError(
            f"no batch arrived within data.worker_timeout={seconds:g} seconds, because the loader workers hang or their file "
            f"system does not answer; {signals.AGAIN}, or raise data.worker_timeout"
        )

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kill(workers: Iterable[Any]) -> None:
    """Kill worker processes, and wait up to `PATIENCE` seconds for each to disappear."""
    with _deaths_unreported():
        for worker in workers:
            with suppress(ValueError):  # it has been closed
                if worker.is_alive():
                    worker.kill()
                    worker.join(PATIENCE)


@contextmanager
def _deaths_unreported() -> Generator[None]:
    """Let workers end inside the block; torch's handler would raise an error for each.

    This works in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


@atexit.register  # runs before the function that multiprocessing.util registered, which waits for all workers
def _kill_all() -> None:
    if _started:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # also for a worker that outlives `PATIENCE`
        kill(_started)


def worker_failure(error: BaseException) -> str:
    """Return a message that tells the user about `error`, which a loader raised because one of its workers has died."""
    if isinstance(error, RuntimeError):
        return f"a loader worker has failed ({first_line(error)}; perhaps out of memory); {signals.AGAIN}"
    return f"a loader worker has exited unexpectedly ({first_line(error)}; perhaps out of memory); {signals.AGAIN}"


def _end_with_parent(worker: int) -> None:
    """Ignore signals in this worker, and end it when the training process ends.

    On Linux, the kernel kills it when its parent ends, even while it is suspended. The parent of a worker of
    `forkserver` is the server, which in turn waits for its workers. So each worker also watches the training process
    itself. Signals must be ignored here too, because a worker of `spawn` or `forkserver` does not inherit the blocked
    signals.
    """
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if (training := parent_process()) is not None:
        threading.Thread(target=_end_after, args=(training,), daemon=True).start()


def _end_after(training: Any) -> None:
    """Kill this process when the training process has ended, even if that was before this worker began."""
    training.join()
    os.kill(os.getpid(), signal.SIGKILL)
