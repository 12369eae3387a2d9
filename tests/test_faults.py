"""What can go wrong with a run, made to go wrong: kills, signals, dead workers, numbers that are not finite."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from killable import POINTS, Run, die_at, start
from soak import Losses, look, soak
from test_resume import assert_equal_states

from cdm_lightning.checkpoint.folder import checkpoints_in, iteration_of
from cdm_lightning.data.loader import SteadyLoader
from cdm_lightning.errors import Preempted, UserError
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.base import TermLosses
from cdm_lightning.objectives.cdm import CDMObjective

Started = Callable[..., Run]
LENGTH = 40


@pytest.fixture
def started(toy_overrides: list[str], tmp_path: Path) -> Started:
    """`started("trainer.max_steps=3", folder="a")` starts a toy run in a process of its own."""

    def begin(*overrides: str, folder: str = "run", **options) -> Run:
        (tmp_path / folder).mkdir(exist_ok=True)
        return start([*toy_overrides, f"trainer.max_steps={LENGTH}", *overrides], tmp_path / folder, **options)

    return begin


def last(place: Path) -> Path:
    return checkpoints_in(place / "checkpoints")[-1]


# ---- SIGKILL


@pytest.mark.parametrize(
    "behind",
    [False, pytest.param(True, marks=pytest.mark.slow)],  # test_background_save.py has a short form of the latter
    ids=["at once", "in the background"],
)
def test_a_run_killed_at_every_point_of_a_save_ends_as_if_nothing_had_happened(behind, started, toy_run, tmp_path):
    every = ("checkpoint.every=4", f"checkpoint.in_background={str(behind).lower()}")
    straight = toy_run(f"trainer.max_steps={LENGTH}", folder="straight")
    losses, newest = Losses(), 0
    for point in POINTS:
        run = started(*every, prepare=die_at, arguments=(point, 3))
        assert run.wait() == [-signal.SIGKILL], run.output
        newest = look(tmp_path / "run/checkpoints", newest, losses)
    assert losses.bytes_lost == 0
    assert started(*every).wait() == [0]
    assert_equal_states(straight.checkpoint, last(tmp_path / "run"))
    assert len([path for path in (tmp_path / "run/checkpoints").iterdir() if path.name != ".lock"]) == 2


@pytest.mark.slow
def test_soak(started, toy_overrides, tmp_path, capsys):
    """At least 24 random kills; `make soak` shows the count."""
    length = ("trainer.max_steps=600", "checkpoint.every=5", "trainer.log_every_n_steps=50")
    assert started(*length, folder="straight").wait(600) == [0]
    (tmp_path / "soaked").mkdir()
    losses = soak([*toy_overrides, *length], tmp_path / "soaked", kills=24, seed=int(os.environ.get("SOAK_SEED", "0")))
    with capsys.disabled():
        print(f"\none process: {losses}")
    assert losses.faults.total() >= 24
    assert losses.bytes_lost == 0
    assert_equal_states(last(tmp_path / "straight"), last(tmp_path / "soaked"))


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_ends_the_run_with_a_checkpoint_and_status_75(started, toy_run, tmp_path, number):
    long = ("trainer.max_steps=400", "checkpoint.every=1000")
    run = started(*long).wait_for_training().kill(number)
    assert run.wait() == [75], run.output
    assert f"{number.name}: saving after this iteration, then stopping" in run.output
    assert f"saved {last(tmp_path / 'run')}; run the same command again to continue" in run.output
    assert "Traceback" not in run.output
    done = iteration_of(last(tmp_path / "run"))
    assert 0 < done < 400
    straight = toy_run(f"trainer.max_steps={done + 2}", folder="straight")
    resumed = toy_run(f"trainer.max_steps={done + 2}", "checkpoint.every=1000")
    assert_equal_states(straight.checkpoint, resumed.checkpoint)


# ---- two at once


def test_a_second_run_in_the_same_folder_is_refused(started, toy_run, tmp_path):
    first = started("trainer.max_steps=4000", "checkpoint.every=1000").wait_for_training()
    config = (tmp_path / "run/config.yaml").read_bytes()
    with pytest.raises(
        UserError, match=rf"another training process uses this folder \(process {first.processes[0].pid} on"
    ):
        toy_run("seed=1")
    assert (tmp_path / "run/config.yaml").read_bytes() == config
    first.kill(signal.SIGKILL).wait()  # however it ends, the folder is free again
    assert toy_run().iteration == 10


def test_a_folder_that_cannot_be_locked_is_refused(toy_run, tmp_path):
    (tmp_path / "run/.lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot be written.*set another run_name"):
        toy_run()


# ---- numbers that are not finite


def poisoned(monkeypatch: pytest.MonkeyPatch, iterations: range, factor: float) -> None:
    """Add `factor` to the fake score's loss in these iterations: its gradient stays what it was."""
    original, module = CDMObjective.fake_score_losses, CDMModule.training_step
    now = [0]

    def step(self, *batch):
        now[0] = self.iteration
        module(self, *batch)

    def losses(self, sample) -> Iterator[TermLosses]:
        for loss in original(self, sample):
            yield TermLosses(loss.total + factor, loss.terms, loss.logs) if now[0] in iterations else loss

    monkeypatch.setattr(CDMModule, "training_step", step)
    monkeypatch.setattr(CDMObjective, "fake_score_losses", losses)


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_leaves_its_update_out(toy_run, monkeypatch, factor):
    poisoned(monkeypatch, range(3, 5), factor)
    result = toy_run()
    assert result.metrics["fake_score/skipped_steps"] == 2
    assert result.metrics["student/skipped_steps"] == 0
    assert all(torch.isfinite(value).all() for value in _tensors(result.checkpoint).values())


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from cdm_lightning.checkpoint.stored import read_checkpoint

    return read_checkpoint(path).tensors()


def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(toy_run, tmp_path, monkeypatch):
    poisoned(monkeypatch, range(5, 100), float("inf"))
    with pytest.raises(UserError) as stopped:
        toy_run("checkpoint.every=2", "checkpoint.keep=5", "checkpoint.max_skipped=4")
    assert str(stopped.value) == (
        "checkpoint.max_skipped=4: the gradient of fake_score was not finite 4 times in a row, up to iteration 9; "
        f"resume from {tmp_path}/run/checkpoints/iteration_0000004 with other settings, such as a lower learning rate"
    )


def test_an_interrupted_row_goes_on_counting(toy_run, monkeypatch):
    poisoned(monkeypatch, range(5, 100), float("inf"))
    toy_run("trainer.max_steps=7", "checkpoint.max_skipped=4")
    with pytest.raises(UserError, match=r"4 times in a row, up to iteration 9; there is no earlier good checkpoint"):
        toy_run("checkpoint.max_skipped=4", "checkpoint.keep=1")


# ---- an end before the first batch


@pytest.mark.parametrize("end", [Preempted("in a test"), UserError("the disk is gone")], ids=["signal", "mistake"])
def test_an_end_before_the_first_batch_is_not_hidden_by_the_clean_up_after_it(toy_run, monkeypatch, end):
    def ends(loader):
        raise end

    monkeypatch.setattr(SteadyLoader, "__iter__", ends)
    with pytest.raises(type(end)) as ended:
        toy_run()
    assert ended.value is end


# ---- a data loader's worker


def test_a_worker_that_dies_ends_the_run_with_a_clear_line(toy_run, monkeypatch):
    original = CDMModule.training_step

    def murderous(self, *batch):
        original(self, *batch)
        if self.iteration == 3:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)

    monkeypatch.setattr(CDMModule, "training_step", murderous)
    # Either torch's handler reports the death, or the pipe to the worker breaks first.
    with pytest.raises(
        UserError, match=r"a loader worker has (failed|exited unexpectedly) .*run the same command again to continue"
    ):
        toy_run("trainer.max_steps=200", "data.num_workers=1", "checkpoint.every=2")
    monkeypatch.setattr(CDMModule, "training_step", original)
    assert toy_run("trainer.max_steps=20", "data.num_workers=1", "checkpoint.every=2").iteration == 20


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch(toy_run, monkeypatch, error):
    def broken(self, *batch):
        raise error

    monkeypatch.setattr(CDMModule, "training_step", broken)
    with pytest.raises(
        UserError, match=r"a loader worker has exited unexpectedly \((reset by peer|EOFError); .*to continue"
    ):
        toy_run("data.num_workers=1")
    with pytest.raises(type(error)):  # without workers it is no fault of theirs
        toy_run("data.num_workers=0", folder="other")
