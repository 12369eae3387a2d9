"""Write a checkpoint in the background: the state is copied into host memory, and a thread writes the copy."""

import warnings
from collections.abc import Callable, Mapping
from threading import Thread

import torch
from torch import Tensor

from cdm_lightning.checkpoint.tensors import WRITES_ALONE
from cdm_lightning.core.ema import local


class BackgroundSave:
    """Writes one checkpoint at a time in a thread, for a run with one process.

    - `start` copies the tensors into host memory, which takes as much memory as a checkpoint, and is kept for the next
      save. The copy is complete when `start` returns, so that training may change the tensors.
    - `settle` waits until the checkpoint is written. It must be called before the next save, before the folder of
      checkpoints is read, and before the run ends.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._iteration = 0
        self._error: BaseException | None = None

    def start(
        self, iteration: int, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], object]
    ) -> None:
        """Copy the tensors of a checkpoint and call `write(copies)` in a thread. An earlier save must be settled."""
        assert self._thread is None
        self._copy(tensors)
        # The thread may not change the filters of warnings itself, because they belong to all threads.
        warnings.filterwarnings("ignore", message=WRITES_ALONE)
        self._iteration = iteration
        self._thread = Thread(target=self._write, args=(write,), name=f"checkpoint of iteration {iteration}")
        self._thread.start()

    def settle(self) -> tuple[int, OSError] | None:
        """Wait until the checkpoint is written. If the disk failed, return its iteration and the error, otherwise None.

        An error that is not OSError is raised here.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is None or isinstance(error, OSError):
            return None if error is None else (self._iteration, error)
        raise error

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors into pinned memory that is allocated once."""
        earlier, self._copies = self._copies, {}
        for name, tensor in tensors.items():
            values = local(tensor)
            copy = earlier.get(name)
            if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
                copy = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
            self._copies[name] = copy.copy_(values, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _write(self, write: Callable[[Mapping[str, Tensor]], object]) -> None:
        try:
            write(self._copies)
        except BaseException as error:  # `settle` tells the main thread
            self._error = error
