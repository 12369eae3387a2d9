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


def test_an_error_of_the_device_is_not_hidden_by_waiting_for_it(monkeypatch):
    waits = []
    monkeypatch.setattr(phases.torch.cuda, "synchronize", waits.append)
    timer = PhaseTimer()
    timer.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="the device failed"), timer("rollout"):
        raise RuntimeError("the device failed")
    assert waits == [timer.device]
    with timer("rollout"):
        pass
    assert len(waits) == 3
