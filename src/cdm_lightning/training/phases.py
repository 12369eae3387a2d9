"""A timer for the phases of an iteration."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the seconds that this process spends in each phase of training.

    One phase is "rollout". The updates of each role are another phase, which has the name of the role. If `device` is a
    CUDA device, CUDA events measure the time of the device's work, and the host waits for the events only when
    `seconds` is read. If `device` is None (the default), the host's clock measures the time.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None  # set by the callback ThroughputMonitor
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # phases whose times are not read yet

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that each phase has taken so far. The host waits until the device has finished the last phase."""
        for phase, begin, end in self._marks:
            end.synchronize()
            self._add(phase, begin.elapsed_time(end) / 1000)
        self._marks.clear()
        return self._seconds

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        """Add the time of the `with` block to `seconds[phase]`, even if the block raises an exception."""
        if self.device is not None and self.device.type == "cuda":
            begin = self._mark()
            yield
            self._marks.append(
                (phase, begin, self._mark())
            )  # skipped after an error, because the device may have failed
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(phase, time.perf_counter() - start)

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
