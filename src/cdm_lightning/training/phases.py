"""Where the time of an iteration goes."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the seconds of an iteration's phases: "rollout" and the role of each update, since this process started.

    With `device`, a CUDA device, it waits for that device around each phase, so that the times are true.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None  # set by a monitor
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        """Add the time of the block to `seconds[phase]`, also of one that raises."""
        self._wait()
        start = time.perf_counter()
        try:
            yield
            self._wait()  # not after an error: the device may be what failed, and would hide why
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
