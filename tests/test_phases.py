"""Where time goes: phases are counted, also those that end in an error."""

import pytest
import torch

from cdm_lightning.training import phases
from cdm_lightning.training.phases import PhaseTimer


def test_the_time_of_a_phase_that_raises_counts(monkeypatch):
    moments = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(moments))
    timer = PhaseTimer()
    with timer("student"):
        pass
    with pytest.raises(KeyError, match="why"), timer("student"):
        raise KeyError("why")
    assert timer.seconds == {"student": 3.5}


class Event:
    """In the place of a CUDA event: the device reaches the marks at 1, 3, 10, 10.5, ... seconds."""

    waits = 0
    moments = (1.0, 3.0, 10.0, 10.5, 20.0)

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at = next(self.clock)

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


def test_a_device_notes_its_own_times_and_nothing_waits_until_they_are_read(monkeypatch):
    Event.clock, Event.waits = iter(Event.moments), 0
    monkeypatch.setattr(phases.torch.cuda, "Event", Event)
    monkeypatch.setattr(phases.torch.cuda, "current_stream", lambda device: None)
    timer = PhaseTimer()
    timer.device = torch.device("cuda")
    for _ in range(2):
        with timer("rollout"):
            pass
    with pytest.raises(RuntimeError, match="the device failed"), timer("student"):
        raise RuntimeError("the device failed")
    assert Event.waits == 0
    assert timer.seconds == {"rollout": 2.5}
    assert Event.waits == 2
    assert timer.seconds == {"rollout": 2.5}
    assert Event.waits == 2
