"""How a run ends: signals at every moment, processes that hang or lose their launcher, and too many processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children

import pytest
import torch
from killable import start
from omegaconf.errors import OmegaConfBaseException
from processes import FORKS, ROOT
from test_resume import assert_equal_states
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from cdm_lightning import train
from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.checkpoint.folder import checkpoints_in, iteration_of
from cdm_lightning.config import command
from cdm_lightning.data import loader
from cdm_lightning.data.batches import DrawnPrompts
from cdm_lightning.data.loader import SteadyLoader
from cdm_lightning.distributed import strategy
from cdm_lightning.distributed.launch import LAUNCHER, SIGNALLED
from cdm_lightning.ends import signals
from cdm_lightning.errors import Preempted, UserError
from cdm_lightning.evaluation.measuring import Measuring
from cdm_lightning.module import CDMModule

ASKING = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT]
BEGIN = "import os, signal, sys, time; from cdm_lightning.ends import signals\n"
SLEEP = "\nprint('ready', flush=True)\ntime.sleep(60)"


def program(text: str, *sent: int, between: float = 0.7, before: str = "", arguments: tuple[str, ...] = ()) -> tuple:
    """Run a program that prints "ready"; send it signals; return its exit code and what it wrote."""
    usual = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests themselves may run under nohup
    process = subprocess.Popen(
        [sys.executable, "-c", usual + before + BEGIN + text, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    output, wait = process.stdout, 0.0
    first = output.readline() if sent else ""
    for number in sent:
        time.sleep(wait)
        os.kill(process.pid, number)
        wait = between
    rest = output.read()
    return process.wait(60), first + rest


# ---- the rule, in programs that import nothing else


@pytest.mark.parametrize("number", ASKING, ids=lambda number: number.name)
def test_the_first_signal_ends_with_75_before_training(number):
    assert program("signals.watch()" + SLEEP, number)[0] == 75
    code, said = program(
        "signals.watch(); signals.loading('while loading')\ntry:"
        + SLEEP.replace("\n", "\n  ")
        + "\nfinally: print('cleaned')",
        number,
    )
    assert code == 75
    assert "cleaned" in said
    assert f"{number.name}: stopped while loading; run the same command again to continue" in said
    assert "Traceback" not in said


COMMAND = "from cdm_lightning.config import command\nwith command('before it was written'):"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_other_commands_with_75_and_one_line(number):
    code, said = program(COMMAND + SLEEP.replace("\n", "\n  "), number)
    assert (code, said) == (
        75,
        f"ready\n{number.name}: stopped before it was written; run the same command again to continue\n",
    )


def test_an_error_of_the_disk_ends_the_other_commands_with_one_line():
    code, said = program(COMMAND + f"open({'x' * 300!r}, 'w')")
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert "File name too long" in said


NOTED = "signals.watch(); signals.training()\nprint('ready', flush=True)\n"


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGINT)])
def test_in_training_the_first_is_noted_and_the_second_stops_at_once(first, second):
    wait = "while not signals.is_asked(): time.sleep(0.01)\nprint('noted')\n"
    assert program(NOTED + wait, first)[0] == 0
    code, said = program(NOTED + wait + "time.sleep(60)", first, second)
    assert code == -second
    assert "a second signal" in said


def test_several_signals_of_one_event_count_as_one():
    """`timeout` signals a process and its group, systemd sends SIGHUP after SIGTERM."""
    wait = "time.sleep(1.5); sys.exit(9 if signals.is_asked() else 8)"
    assert program(NOTED + wait, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, between=0.02)[0] == 9


def test_after_the_save_any_further_signal_ends_with_75():
    text = NOTED + "while not signals.is_asked(): time.sleep(0.01)\nsignals.saved(); time.sleep(60)"
    assert program(text, signal.SIGTERM, signal.SIGINT)[0] == 75


def test_a_signal_that_came_before_is_not_lost_in_the_next_phase():
    text = NOTED + "while not signals.is_asked(): time.sleep(0.01)\nsignals.loading('after training')\nprint('went on')"
    code, said = program(text, signal.SIGUSR2)
    assert code == 75
    assert "went on" not in said


def test_what_nohup_ignores_stays_ignored():
    text = NOTED + "time.sleep(0.5); sys.exit(9 if signals.is_asked() else 8)"
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    assert program(text, signal.SIGHUP, before=ignoring)[0] == 8
    assert program(text, signal.SIGHUP)[0] == 9


def test_code_that_catches_every_exception_does_not_keep_a_run_alive():
    text = "signals.watch(); signals.loading('x')\nprint('ready', flush=True)\ntry: time.sleep(60)\nexcept Exception: time.sleep(60)"
    assert program(text, signal.SIGTERM)[0] == 75


def test_processes_that_are_started_while_signals_are_held_never_get_them():
    text = (
        "import subprocess; signals.watch(); signals.training()\n"
        "with signals.held(): child = subprocess.Popen(['sleep', '60'])\n"
        "print('ready', flush=True)\nwhile not signals.is_asked(): time.sleep(0.01)\n"
        "for number in signals.SIGNALS: child.send_signal(number)\n"
        "time.sleep(0.2); alive = child.poll() is None; child.kill(); sys.exit(9 if alive else 8)"
    )
    assert program(text, signal.SIGTERM)[0] == 9


# ---- a run in this process


@pytest.fixture
def validated(toy_run):
    """A toy run of 6 iterations that validates after every third."""

    def run(*overrides: str, folder: str = "run"):
        return toy_run(
            "trainer.max_steps=6", "trainer.limit_val_batches=1.0", "trainer.val_check_interval=3", "data.val_prompts=4",
            "checkpoint.every=100", *overrides, folder=folder,
        )  # fmt: skip

    return run


def ask_in(monkeypatch, owner: type, name: str, call: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to this process in the `call`-th call of a method."""
    original, left = getattr(owner, name), [call]

    def asking(self, *values, **options):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(number)
        return original(self, *values, **options)

    monkeypatch.setattr(owner, name, asking)


PLACES = {  # where the signal comes, and the iteration of the checkpoint that there is then
    "loading": (Toy2DBackbone, "build_network", 1, None),
    "an iteration": (CDMModule, "training_step", 2, 2),
    "a read": (DrawnPrompts, "__getitem__", 14, 1),  # of the fourth batch of four, which is read ahead
    "a validation": (CDMModule, "validation_step", 1, 3),
    "the last validation": (CDMModule, "validation_step", 2, 6),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere_loses_nothing(validated, tmp_path, monkeypatch, place):
    owner, name, call, saved = PLACES[place]
    before = {number: signal.getsignal(number) for number in ASKING}
    with monkeypatch.context() as patched:
        ask_in(patched, owner, name, call)
        with pytest.raises(Preempted) as stopped:
            validated()
    assert stopped.value.code == 75
    assert {number: signal.getsignal(number) for number in ASKING} == before
    found = [iteration_of(path) for path in checkpoints_in(tmp_path / "run/checkpoints")]
    assert found == ([saved] if saved else [])
    again = validated()
    assert_equal_states(validated(folder="straight").checkpoint, again.checkpoint)


def test_a_signal_in_the_evaluation_at_the_end_is_75_and_the_next_start_evaluates(
    validated, tmp_path, monkeypatch, capfd
):
    ladder = ("callbacks=ladder", "callbacks.ladder.evaluation.count=4", "metric=energy_distance")
    with monkeypatch.context() as patched:
        ask_in(patched, Measuring, "measure", 2)
        with pytest.raises(Preempted):
            validated(*ladder)
    assert "SIGTERM: stopped after training" in capfd.readouterr().err
    assert not (tmp_path / "run/metrics.json").exists()
    assert validated(*ladder).iteration == 6
    assert (tmp_path / "run/metrics.json").exists()


# ---- loader workers


def own_group(rank: int) -> None:
    os.setpgid(0, 0)


GROUPS = [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in ASKING[1:])]


@pytest.mark.parametrize("number", GROUPS)
def test_a_signal_to_the_whole_group_saves_also_with_loader_workers(toy_overrides, tmp_path, number):
    options = ("trainer.max_steps=4000", "checkpoint.every=10000", "data.num_workers=2")
    run = start([*toy_overrides, *options], tmp_path, prepare=own_group).wait_for_training()
    os.killpg(run.processes[0].pid, number)
    assert run.wait() == [75], run.output
    assert "Traceback" not in run.output
    assert checkpoints_in(tmp_path / "checkpoints")


def test_a_suspended_worker_ends_the_run_with_a_line_and_a_checkpoint(toy_run, tmp_path, monkeypatch):
    original = CDMModule.training_step

    def suspending(self, *batch):
        original(self, *batch)
        if self.iteration == 3:
            loader = self.trainer.datamodule._loaders[0]
            for worker in loader._workers:
                os.kill(worker.pid, signal.SIGSTOP)
            assert loader.patience == 300
            loader.patience = 1  # from here on: the start of a worker takes long on a busy machine

    before = set(active_children())
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # torch's waits for a worker's end
    monkeypatch.setattr(CDMModule, "training_step", suspending)
    options = ("trainer.max_steps=4000", "checkpoint.every=10000", "data.num_workers=1", "data.worker_timeout=300")
    with pytest.raises(
        UserError, match=r"no batch arrived within data.worker_timeout=1 seconds.*run the same command again"
    ):
        toy_run(*options)
    assert set(active_children()) <= before
    saved = checkpoints_in(tmp_path / "run/checkpoints")
    assert len(saved) == 1
    assert iteration_of(saved[0]) >= 3


def wait_as_a_worker(training, begun) -> None:
    """A loader worker of the server of workers; `training` stands for the training process: it ends when the pipe closes."""
    multiprocessing.process._parent_process = multiprocessing.process._ParentProcess("train", 0, training.fileno())
    loader._end_with_parent(0)
    begun.set()
    time.sleep(600)


def test_a_worker_whose_parent_is_the_server_of_workers_ends_with_the_training_process():
    """Such a server waits for its workers, so a worker that waited for its parent would stay for ever."""
    here, there = FORKS.Pipe()
    begun = FORKS.Event()
    worker = FORKS.Process(target=wait_as_a_worker, args=(there, begun), daemon=True)
    worker.start()
    there.close()
    assert begun.wait(60)
    assert worker.is_alive()
    here.close()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


def test_workers_that_a_signal_finds_while_they_start_are_killed(monkeypatch):
    begin = DataLoader.__iter__

    def interrupted(loader):
        batches = begin(loader)
        os.kill(os.getpid(), signal.SIGTERM)
        return batches

    monkeypatch.setattr(DataLoader, "__iter__", interrupted)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # set once by torch; tests may undo it
    loader, before = SteadyLoader([1, 2, 3], num_workers=1), set(active_children())
    with signals.watched():
        signals.loading("in a test")
        with pytest.raises(Preempted) as stopped:  # its frames keep the iterator, which would end the worker, alive
            iter(loader)
    assert len(set(active_children()) - before) == 1
    loader.kill_workers()
    assert set(active_children()) <= before
    assert stopped.value.where == "in a test"


def test_a_signal_that_another_thread_receives_is_held_back_too(monkeypatch):
    """Only the calling thread blocks signals, and the kernel gives a signal to any thread that does not."""
    over, through = threading.Event(), []
    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()

    def hold() -> None:
        with signals.held():
            for number in (signal.SIGTERM, signal.SIGHUP):  # as systemd sends them
                signal.pthread_kill(thread.ident, number)
                time.sleep(0.2)  # the handler runs here
            through.append(True)

    try:
        with signals.watched():
            signals.loading("in a test")
            with pytest.raises(Preempted):
                hold()
            monkeypatch.setattr(signals, "SAME_EVENT", 0.0)
            monkeypatch.setattr(signals, "_end_at_once", lambda number: pytest.fail("a signal was kept for later"))
            with signals.held():
                pass
    finally:
        over.set()
    assert through


# ---- ranks and launchers


def test_a_rank_whose_launcher_died_before_it_signed_on_ends_itself(tmp_path):
    sign_on = (
        "from pathlib import Path; from cdm_lightning.distributed.launch import sign_on\n"
        "sign_on(Path(sys.argv[1])); time.sleep(60)"
    )
    (tmp_path / LAUNCHER).write_text("1")  # its parent is this process
    assert program(sign_on, arguments=(str(tmp_path),))[0] == 75


@pytest.mark.slow
def test_a_suspended_rank_ends_the_run_with_a_line(toy_overrides, tmp_path):
    options = (
        "trainer.max_steps=4000",
        "strategy=ddp",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "strategy.timeout=5",
    )
    run = start([*toy_overrides, *options], tmp_path, 2).wait_for_training()
    run.kill(signal.SIGSTOP, 1)
    run.processes[0].join(60)
    run.kill(signal.SIGKILL, 1)
    assert run.wait()[0] == 2, run.output
    assert "did not answer for 5.0 seconds (strategy.timeout)" in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("devices", [1000, "1000", 0, -3, 10**9, list(range(1000)), "0,1,2,3,4,5,6,7,8,9"])
def test_more_processes_than_the_machine_has_room_for_are_refused(devices, monkeypatch):
    monkeypatch.setattr(strategy.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    with pytest.raises(UserError, match=r"^trainer.devices=.*this machine has 2 CPU cores.*from 1 to 4$"):
        strategy.require_devices(devices, "cpu")
    for allowed in (1, 2, 4, "2", [0, 1], "0,1"):
        strategy.require_devices(allowed, "cpu")
    monkeypatch.setattr(strategy.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"this machine has 2 GPUs"):
        strategy.require_devices(3, "gpu")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9])
def test_timeouts_are_positive_and_finite(toy_run, seconds):
    with pytest.raises(UserError, match="worker_timeout"):
        toy_run(f"data.worker_timeout={seconds}")
    with pytest.raises(UserError, match="timeout"):
        strategy.MeshStrategy(1, 1, timeout=seconds)


def test_the_files_of_the_launcher_and_its_ranks_have_one_meaning():
    assert SIGNALLED != LAUNCHER
    assert set(signals.SIGNALS) == set(ASKING)


@pytest.mark.parametrize(
    "hides", [OmegaConfBaseException(""), OSError(5, "Input/output error"), RuntimeError("clean-up")]
)
def test_an_error_of_a_library_that_a_signal_passes_through_is_no_mistake(hides, monkeypatch, tmp_path, capsys):
    """OmegaConf, interrupted by a signal, cleans up and fails at that; the run has stopped, and all is said already."""

    def interrupted(config):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except SystemExit:
            raise hides from None

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(train, "check_config", interrupted)
    monkeypatch.setattr(sys, "argv", ["train", "experiment=toy2d_cdm", "run_name=mine"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 75
    assert "error:" not in capsys.readouterr().err

    with pytest.raises(SystemExit) as ended, command("before it was done"):  # the other commands
        interrupted(None)
    assert ended.value.code == 75
    assert "error:" not in capsys.readouterr().err
