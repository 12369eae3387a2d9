"""In steady state, no line of an iteration makes the host wait for the device; what it has skipped is fetched in the next one."""

from dataclasses import replace

import pytest
import torch
from waits import host_waits

from benchmarks.set_up import attach, batch, build_module
from benchmarks.sizes import SIZES
from cdm_lightning.backbones import packing
from cdm_lightning.checkpoint.health import not_finite
from cdm_lightning.objectives.base import TermLosses
from cdm_lightning.objectives.cdm import CDMObjective


def waits_of(name: str, monkeypatch: pytest.MonkeyPatch, **changes) -> dict:
    """The waits in the second cycle of a benchmark's network; in the first one states and tables are made."""
    size = replace(SIZES[name], longest_rollout=2, **changes)
    module = build_module(size)
    attach(module)
    encode = module.backbone.encode_prompts

    def run(iteration: int) -> None:
        module.iteration = iteration
        module.training_step(batch(iteration, size.batch, module.groups.of(iteration)), 0)

    for iteration in range(2):
        run(iteration)
    packing._kept_ids.cache_clear()
    with host_waits(monkeypatch) as waits:
        for optimizer in module._trainer.strategy._lightning_optimizers:
            waits.mark(value for state in optimizer.state.values() for value in state.values())
        waits.mark([*module.networks.parameters(), *module.networks.buffers()])
        waits.mark([*module.networks.teacher.parameters(), *module.networks.teacher.buffers()])
        waits.mark(
            value
            for each in module.networks.modules()
            for value in vars(each).values()
            if isinstance(value, torch.Tensor)
        )

        def encoded(prompts):
            found = encode(prompts)
            waits.mark(found.values())
            return found

        monkeypatch.setattr(module.backbone, "encode_prompts", encoded)
        for iteration in range(2, 4):
            run(iteration)
    assert module.updates.skipped_steps == {"student": 0, "fake_score": 0}
    return dict(waits.found)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sd3_toy", {}),
        ("longcat_toy", {}),
        pytest.param("sd3_toy", {"accumulate": 2, "compute_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=["sd3", "longcat", "sd3 in parts in bfloat16"],
)
def test_no_line_of_an_iteration_waits_for_the_device(name, changes, monkeypatch):
    assert waits_of(name, monkeypatch, **changes) == {}


def test_a_line_that_waits_is_found(monkeypatch):
    losses = CDMObjective.fake_score_losses

    def waiting(self, sample):
        for found in losses(self, sample):
            weight = (
                torch.ones(1) if float(found.total) > 0 else torch.zeros(1)
            )  # reads, then uses a tensor of the host
            yield TermLosses(found.total * weight[0] + (found.total.reshape(1) * weight).sum())

    monkeypatch.setattr(CDMObjective, "fake_score_losses", waiting)
    found = waits_of("sd3_toy", monkeypatch)
    kinds = {what for what, place in found if place.startswith("tests/test_waits.py")}
    assert kinds == {"item", "copy"}
    assert sum(found.values()) >= 4  # both in each of two iterations


def test_marks_end_with_their_tensors():
    from waits import HostWaits

    waits = HostWaits()
    kept = torch.ones(3)
    waits.mark([kept, torch.ones(4)])
    assert waits.holds(kept[1:])
    assert len(waits._on_device) == 1


@pytest.mark.parametrize("wrong", [None, "student.1", "student_ema.2"])
def test_weights_are_checked_with_one_wait_though_some_are_in_host_memory(wrong, monkeypatch):
    student = {f"networks.student.{number}": torch.ones(3) for number in range(4)}
    average = {f"networks.student_ema.{number}": torch.ones(3) for number in range(4)}
    tensors = {**student, **average}
    if wrong is not None:
        tensors[f"networks.{wrong}"][1] = float("nan")
    with host_waits(monkeypatch) as waits:
        waits.mark(student.values())
        assert not_finite(tensors, torch.nn.Module()) == wrong
    assert [(what, place.split(":")[0]) for what, place in waits.found.elements()] == [
        ("tolist", "checkpoint/health.py")
    ]
