"""Checkpoints that are written while training goes on: what a kill leaves, what waits for them, and that they are the same."""

import shutil
import threading
from types import SimpleNamespace

import pytest
import torch

from cdm_lightning.checkpoint import callback, save
from cdm_lightning.checkpoint.background import BackgroundSave
from cdm_lightning.checkpoint.callback import IterationCheckpoint
from cdm_lightning.checkpoint.folder import SAVING, checkpoints_in, iteration_of
from cdm_lightning.checkpoint.stored import newest_checkpoint, read_checkpoint
from cdm_lightning.ends import signals
from cdm_lightning.errors import Preempted, UserError
from cdm_lightning.module import CDMModule

EVERY_TWO = ("checkpoint.every=2", "trainer.max_steps=7", "checkpoint.keep=null", "trainer.limit_val_batches=0")
BEHIND = ("checkpoint.in_background=true", *EVERY_TWO)


def iterations(folder) -> list[int]:
    return [iteration_of(path) for path in checkpoints_in(folder / "checkpoints")]


@pytest.fixture
def held(monkeypatch):
    """`held.saves` holds back the commit of these iterations in the thread until `held.go` is set; `held.began` is set then."""
    state = SimpleNamespace(saves={4}, go=threading.Event(), began=threading.Event())
    commit = save.commit

    def holding(temporary, sums):
        if threading.current_thread() is not threading.main_thread() and int(temporary.name[-7:]) in state.saves:
            state.began.set()
            assert state.go.wait(60)
        return commit(temporary, sums)

    monkeypatch.setattr(save, "commit", holding)
    yield state
    state.go.set()


def in_iteration(monkeypatch, number: int, work) -> None:
    """Call `work(module)` at the start of an iteration."""
    step = CDMModule.training_step

    def watched(self, batch, index):
        if self.iteration == number:
            work(self)
        return step(self, batch, index)

    monkeypatch.setattr(CDMModule, "training_step", watched)


def test_a_checkpoint_from_the_background_is_the_same(toy_run):
    at_once, behind = toy_run(*EVERY_TWO, folder="at_once").folder, toy_run(*BEHIND, folder="behind").folder
    assert iterations(behind) == iterations(at_once) == [2, 4, 6, 7]
    for one, other in zip(checkpoints_in(at_once / "checkpoints"), checkpoints_in(behind / "checkpoints")):
        a, b = read_checkpoint(one), read_checkpoint(other)
        assert a.record == b.record
        assert a.trainer_state() == b.trainer_state()
        expected, found = a.tensors(), b.tensors()
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_kill_in_between_leaves_the_earlier_checkpoint_and_the_run_goes_on_from_it(
    toy_run, held, monkeypatch, tmp_path
):
    def kill(module):  # what the disk holds at this moment is what a kill leaves
        assert held.began.wait(60)
        if not held.go.is_set():  # in the first of the two runs
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
        held.go.set()

    in_iteration(monkeypatch, 5, kill)  # training has gone on, while the checkpoint of iteration 4 is not complete
    whole = toy_run(*BEHIND).folder
    assert iterations(whole) == [2, 4, 6, 7]
    killed = tmp_path / "killed" / "checkpoints"
    assert iterations(tmp_path / "killed") == [2]
    assert (killed / f"{SAVING}iteration_0000004").is_dir()
    assert newest_checkpoint(killed).iteration == 2
    resumed = toy_run(*BEHIND, folder="killed").folder
    assert iterations(resumed) == [2, 4, 6, 7]
    expected, found = (newest_checkpoint(folder / "checkpoints").tensors() for folder in (whole, resumed))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_signal_waits_for_it(toy_run, held, monkeypatch, tmp_path):
    def ask(module):
        assert held.began.wait(60)
        asked.append(module.iteration)

    def settle(self):
        if asked:
            held.go.set()
        return waits(self)

    asked, waits = [], BackgroundSave.settle
    in_iteration(monkeypatch, 4, ask)
    monkeypatch.setattr(signals, "is_asked", lambda: bool(asked))
    monkeypatch.setattr(BackgroundSave, "settle", settle)
    with pytest.raises(Preempted):
        toy_run(*BEHIND)
    assert iterations(tmp_path / "run") == [2, 4, 5]
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").iteration == 5


def test_an_error_waits_for_it(toy_run, held, monkeypatch, tmp_path):
    def fail(module):
        assert held.began.wait(60)
        threading.Timer(0.1, held.go.set).start()
        raise ValueError("a mistake in the middle of an iteration")

    in_iteration(monkeypatch, 4, fail)
    with pytest.raises(ValueError, match="in the middle"):
        toy_run(*BEHIND)
    assert iterations(tmp_path / "run") == [2, 4]
    assert not list((tmp_path / "run" / "checkpoints").glob(f"{SAVING}*"))


def test_a_validation_waits_for_it_before_it_names_the_best(toy_run, held, monkeypatch):
    seen = []
    note = callback.note_validation

    def noting(folder, iteration):
        seen.append((iteration, [iteration_of(path) for path in checkpoints_in(folder)]))
        note(folder, iteration)

    held.saves = {2, 4}
    monkeypatch.setattr(callback, "note_validation", noting)
    started = BackgroundSave.start
    monkeypatch.setattr(
        BackgroundSave, "start", lambda *given: (started(*given), threading.Timer(0.1, held.go.set).start())
    )
    toy_run(*BEHIND[:-1], "trainer.limit_val_batches=1", "trainer.val_check_interval=2")
    assert seen[:2] == [(2, [2]), (4, [2, 4])]


def test_a_full_disk_is_reported_and_the_run_goes_on(toy_run, monkeypatch, capsys):
    save_tensors = save.save_tensors

    def failing(tensors, folder, alone=False):
        if alone and folder.name.endswith("4"):
            raise OSError(28, "No space left on device")
        return save_tensors(tensors, folder, alone)

    monkeypatch.setattr(save, "save_tensors", failing)
    folder = toy_run(*BEHIND).folder
    assert iterations(folder) == [2, 6, 7]
    [warning] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert "the checkpoint of iteration 4 could not be written" in warning
    assert "No space left on device" in warning
    assert "iteration_0000002 is intact" in warning


def test_the_copy_is_that_of_the_moment_and_its_memory_is_used_again():
    saves, seen, values = BackgroundSave(), [], torch.ones(3)
    go = threading.Event()

    def write(copies):
        assert go.wait(60)
        seen.append((copies["a"].clone(), copies["a"].data_ptr()))

    for number in (1, 2):
        go.clear()
        saves.start(number, {"a": values}, write)
        values += 1
        go.set()
        assert saves.settle() is None
    (first, place), (second, same_place) = seen
    assert first.tolist() == [1, 1, 1]
    assert second.tolist() == [2, 2, 2]
    assert place == same_place


def test_an_error_that_is_not_of_the_disk_ends_the_run():
    saves = BackgroundSave()

    def write(copies):
        raise ValueError("a mistake")

    saves.start(1, {}, write)
    with pytest.raises(ValueError, match="a mistake"):
        saves.settle()
    assert saves.settle() is None


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.in_background=true is for runs with one process"):
        IterationCheckpoint(tmp_path, in_background=True).setup(SimpleNamespace(world_size=2), None, "fit")
