"""Several processes from one command: Hydra runs once, signals and exit status are passed on, mistakes are told once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from processes import command, environment

from cdm_lightning import config as configuration
from cdm_lightning.checkpoint.stored import newest_checkpoint
from cdm_lightning.distributed.launch import forwarded_signals, is_launched, run_processes
from cdm_lightning.errors import UserError

SIGN_ON = (
    "import os, pathlib, signal, sys, time; from cdm_lightning.distributed.launch import sign_on; "
    "folder = pathlib.Path(sys.argv[1]);"
)
TRAIN = ("-m", "cdm_lightning.train")
TWO = ("trainer.devices=2", "strategy=fsdp2", "trainer.accelerator=cpu", "trainer.max_steps=2", "run_name=swept")
WAITING = f"{SIGN_ON} signal.signal(signal.SIGTERM, lambda *_: os._exit(75)); sign_on(folder); time.sleep(60)"


@pytest.fixture(autouse=True)
def child_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def write_program(folder: Path, text: str) -> list[str]:
    file = folder / "program.py"
    file.write_text(text.replace("; ", "\n"), encoding="utf-8")
    return [str(file)]


@pytest.mark.parametrize(("ends", "status"), [("sys.exit(75)", 75), ("sys.exit(2)", 2), ("pass", 0)])
def test_the_exit_status_of_the_first_that_fails_is_passed_on(ends, status, tmp_path, capfd):
    rest = "time.sleep(60)" if status else "pass"
    text = f"{SIGN_ON} sign_on(folder)\nif os.environ['RANK'] == '1': {ends}\nelse: {rest}\n"
    began = time.perf_counter()
    assert run_processes(tmp_path, 2, write_program(tmp_path, text), grace=2) == status
    assert time.perf_counter() - began < 50
    assert capfd.readouterr().err == ""


def test_a_process_that_is_killed_is_named_and_the_others_are_stopped(tmp_path, capfd):
    text = (
        f"{SIGN_ON} sign_on(folder)\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    )
    assert run_processes(tmp_path, 2, write_program(tmp_path, text), grace=2) == 137
    assert capfd.readouterr().err == "error: process 1 was ended by SIGKILL; the others were stopped\n"


def test_signals_reach_all_processes(tmp_path):
    program, before = write_program(tmp_path, WAITING), signal.getsignal(signal.SIGTERM)

    def interrupt() -> None:
        while len(list(tmp_path.glob("*.pid"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with forwarded_signals(tmp_path):
        assert run_processes(tmp_path, 2, program, grace=2) == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_before_a_process_is_up_ends_it(tmp_path):
    (tmp_path / "signal").write_text("15")
    assert run_processes(tmp_path, 2, write_program(tmp_path, WAITING), grace=2) == 75


def test_a_process_whose_launcher_died_ends_itself(tmp_path):
    starter = (
        "import os, subprocess, sys, time; open(sys.argv[-1] + '/launcher', 'w').write(str(os.getpid())); "
        "subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True); time.sleep(60)"
    )
    program = write_program(tmp_path, f"{SIGN_ON} sign_on(folder); time.sleep(60)")
    launcher = subprocess.Popen([sys.executable, "-c", starter, *program, str(tmp_path)])
    while not list(tmp_path.glob("*.pid")):
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    process = int(next(tmp_path.glob("*.pid")).stem)
    for _ in range(300):
        if not is_running(process):
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def is_running(process: int) -> bool:
    """Whether there is such a process that is more than an entry waiting to be collected."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def test_who_is_launched():
    assert not is_launched({})
    assert not is_launched({"SLURM_NTASKS": "1"})  # a batch script that starts the command once
    assert is_launched({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    assert is_launched({"RANK": "0", "WORLD_SIZE": "1"})


def test_other_processes_leave_it_to_the_first_to_tell_of_a_mistake(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(configuration.time, "sleep", waited.append)
    for rank, said in (("0", "error: wrong\n"), ("3", "error: process 3: wrong\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            configuration.fail(UserError("wrong"))
        assert caught.value.code == 2
        assert capsys.readouterr().err == said
    assert waited == [configuration.OTHERS_WAIT]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_one_command_runs_a_sweep_of_jobs_with_two_processes_each(seeds, toy_overrides, tmp_path):
    swept = f"seed={','.join(map(str, seeds))}"
    done = command(
        [*TRAIN, "-m", *toy_overrides, *TWO, swept, "+secret_token=hidden"], tmp_path
    )  # Hydra wants flags first
    assert done.returncode == 0, done.stderr
    jobs = [path.parent for path in (tmp_path / "outputs/swept/multirun").glob("*/config.yaml")]
    configs = [yaml.safe_load((job / "config.yaml").read_text()) for job in jobs]
    assert sorted((config["seed"], config["secret_token"]) for config in configs) == [(seed, "***") for seed in seeds]
    for job in jobs:
        assert newest_checkpoint(job / "checkpoints").path.name == "iteration_0000002"
        assert "trainer.devices=2" in json.loads((job / "starts.jsonl").read_text())["command"]
        assert len(list((job / "logs").iterdir())) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "outputs"]


def test_what_all_processes_find_wrong_is_one_line(toy_overrides, tmp_path):
    wrong = command([*TRAIN, *toy_overrides, *TWO, "objective.student_every=0"], tmp_path)
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    assert wrong.stderr.startswith("error: objective.student_every=0")
