"""A timer for the phases of an iteration."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the seconds that this process spends in each phase of training.

    The phases are "rollout" and the updates of each role, named by the role. If `device` is a CUDA device, the timer waits for it
    before and after each phase, so that the seconds include the device's work. If `device` is None (the default), they are those
    of the host.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None  # set by the callback ThroughputMonitor
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        """Add the time of the `with` block to `seconds[phase]`, even if the block raises an exception."""
        self._wait()
        start = time.perf_counter()
        try:
            yield
            self._wait()  # not after an error: if the device has failed, waiting would raise another error
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
