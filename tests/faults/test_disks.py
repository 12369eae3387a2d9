"""Disks that are full or cannot be written, and terminals that go away: only the last save ends a run."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import Logger
from processes import ROOT
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_resume import assert_equal_states

from cdm_lightning.callbacks.loggers import CSVLogger, GuardedLogger
from cdm_lightning.ends import optional
from cdm_lightning.ends.optional import may_fail
from cdm_lightning.evaluation.ladder import LadderResult
from cdm_lightning.evaluation.report import METRICS, PICTURE, TABLE, save_report
from cdm_lightning.files import append_text, replacing, replacing_folder
from cdm_lightning.module import CDMModule
from cdm_lightning.run.record import record_start

FULL = OSError(errno.ENOSPC, "No space left on device")


TENSORBOARD = (
    "+logger.tensorboard._target_=lightning.pytorch.loggers.TensorBoardLogger",
    "+logger.tensorboard.save_dir=${output_dir}",
    "+logger.tensorboard.name=logs",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 2 MB; `fill(disk)` leaves no room on it."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def free(disk: Path) -> None:
    (disk / "filler").unlink()


# ---- a whole run


def test_a_disk_that_fills_up_and_is_freed_ends_no_run(toy_run, disk, monkeypatch, capfd):
    """Checkpoints are on another disk; the logs, pictures and scores of all kinds of callbacks are on the full one."""
    original = CDMModule.training_step

    def crowded(self, *batch):
        if self.iteration == 4:
            fill(disk)
        if self.iteration == 55:  # more rows than the file's last block has room for
            free(disk)
        original(self, *batch)

    options = (
        "trainer.limit_val_batches=1.0", "trainer.val_check_interval=20", "trainer.max_steps=60", "data.val_prompts=4",
        "callbacks=default",
        *TENSORBOARD, "metric=energy_distance",
    )  # fmt: skip
    straight = toy_run(*options, folder="straight")
    monkeypatch.setattr(CDMModule, "training_step", crowded)
    result = toy_run(*options, f"output_dir={disk}/run", f"checkpoint.folder={disk.parent}/checkpoints")
    assert result.iteration == 60
    assert_equal_states(straight.checkpoint, result.checkpoint)
    said = capfd.readouterr().err
    for name in ("CSVLogger", "TensorBoardLogger"):
        assert said.count(f"WARNING: the log of {name} could not be written (No space left on device)") == 1
        assert said.count(f"the log of {name} can be written again") == 1
    assert "Traceback" not in said
    with next(disk.glob("run/logs/*/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(float(row["step"])) for row in rows if row["fake_score/loss"]]
    assert steps == list(range(1, 61))  # the rows of the full disk were kept and written later
    assert len(list(disk.glob("run/logs/*/events*"))) > 1
    assert [path.name for path in (disk / "run/samples").iterdir()] == ["iteration_0000060.png"]
    assert said.count("WARNING: ") == 3


def test_a_start_on_a_full_disk_warns_and_goes_on(disk, tmp_path, capfd, monkeypatch):
    from cdm_lightning.run.folder import Run

    run = Run.create(disk / "run")
    record_start({"seed": 1}, run, 1)
    before = (disk / "run/starts.jsonl").read_bytes()
    fill(disk)
    with (disk / "run/starts.jsonl").open("ab") as file:  # use up the last block too
        file.write(bytes(4096 - len(before) % 4096))
    before = (disk / "run/starts.jsonl").read_bytes()
    record_start({"seed": 2}, run, 1)
    assert (disk / "run/starts.jsonl").read_bytes() == before
    assert capfd.readouterr().err.count("WARNING") == 2
    free(disk)
    record_start({"seed": 3}, run, 1)
    assert json.loads((disk / "run/starts.jsonl").read_text().splitlines()[-1])["config"] == {"seed": 3}


# ---- the guard


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(optional, "_failing", set())


ERRORS = [
    FULL,
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EROFS, "Read-only file system"),
    OSError(errno.EIO, "Input/output error"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")))
def test_a_disk_error_is_one_warning_until_it_works_again(error, capsys, tmp_path):
    for _ in range(3):
        with may_fail("a file"):
            raise error
    with may_fail("a file"):
        pass
    with may_fail("a file"):
        pass
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("WARNING: a file could not be written (")
    assert said[1] == "a file can be written again"
    with pytest.raises(OSError, match=str(error.args[-1]).partition(" (os error")[0]), replacing(tmp_path / "a"):
        raise error  # the writers of what is needed raise it


def test_a_mistake_in_the_code_is_no_disk_error():
    with pytest.raises(KeyError), may_fail("a file"):
        raise KeyError("x")


class Broken(Logger):
    """A logger whose service has gone away."""

    name, version = "broken", 0

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def log_metrics(self, metrics, step=None):
        raise self.error

    log_hyperparams = log_image = finalize = save = log_metrics


@pytest.mark.parametrize(
    "error", [FULL, BrokenPipeError(), RuntimeError("service died"), ConnectionResetError("reset"), ValueError()]
)
def test_no_logger_ends_a_run(error, capsys):
    from PIL import Image

    logger = GuardedLogger(Broken(error))
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
        logger.log_hyperparams({"a": 1})
        logger.log_picture("val/samples", Image.new("RGB", (2, 2)), step)
        logger.save()
    logger.finalize("success")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["metrics.csv", "logs"])
def test_rows_that_could_not_be_written_are_written_later(tmp_path, name, capsys):
    logger = CSVLogger(tmp_path, name="logs", flush_logs_every_n_steps=1)
    guarded = GuardedLogger(logger)
    guarded.log_metrics({"a": 1.0}, 0)
    file = tmp_path / "logs/version_0/metrics.csv"
    moved, stays = (file, file.read_bytes()) if name == "metrics.csv" else (tmp_path / "logs", file.read_bytes())
    moved.rename(tmp_path / "away")
    (moved if name == "logs" else file.parent / "metrics.csv").symlink_to(
        "/dev/full" if name == "metrics.csv" else "/nowhere"
    )
    guarded.log_metrics({"a": 2.0}, 1)
    guarded.save()
    moved.unlink()
    (tmp_path / "away").rename(moved)
    assert file.read_bytes() == stays
    guarded.log_metrics({"a": 3.0, "b": 4.0}, 2)
    guarded.save()
    with file.open() as rows:
        assert [(row["step"], row["a"], row["b"]) for row in csv.DictReader(rows)] == [
            ("0", "1.0", ""),
            ("1", "2.0", ""),
            ("2", "3.0", "4.0"),
        ]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_report_whose_files_cannot_be_written_is_a_warning(tmp_path, capsys):
    images = {"student": torch.rand(1, 3, 4, 4)}
    result = LadderResult([{"sampler": "student", "loss": 1.0}], [], images, ["a"], {}, {})
    (tmp_path / TABLE).mkdir()  # a folder is in its place
    (tmp_path / PICTURE).write_text("of an earlier evaluation")
    paths = save_report(result, tmp_path)
    assert [path.is_file() for path in paths.values()] == [True, False, True, True]
    assert paths[PICTURE].read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err.startswith(f"WARNING: {tmp_path / TABLE} could not be written")


def test_a_report_leaves_pipes_and_links_in_its_place(tmp_path, capsys):
    """An earlier version is deleted before the new one is written, but only if it is a file."""
    result = LadderResult([{"sampler": "student", "loss": 1.0}], [], {"student": torch.rand(1, 3, 4, 4)}, ["a"], {}, {})
    os.mkfifo(tmp_path / METRICS)
    os.mkfifo(tmp_path / TABLE)
    (tmp_path / "elsewhere.png").write_text("of an earlier evaluation")
    (tmp_path / PICTURE).symlink_to("elsewhere.png")
    paths = save_report(result, tmp_path)
    assert paths[METRICS].is_fifo()
    assert paths[TABLE].is_fifo()
    assert paths[PICTURE].is_symlink()
    assert (tmp_path / "elsewhere.png").read_bytes().startswith(b"\x89PNG")
    assert "it exists and is not a regular file" in capsys.readouterr().err


# ---- writers


def test_lines_are_appended_whole_or_not_at_all(disk):
    file = disk / "lines"
    append_text(file, "first\n")
    with file.open("ab") as cut:
        cut.write(b"cut of")
    append_text(file, "second\n")
    assert file.read_text() == "first\ncut of\nsecond\n"
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        append_text(file, "x" * 100_000 + "\n")
    assert file.read_text() == "first\ncut of\nsecond\n"
    free(disk)
    append_text(file, "third\n")
    assert file.read_text().endswith("second\nthird\n")


def test_a_full_disk_is_an_oserror_whatever_library_writes(disk):
    fill(disk)
    tensors = {"a": torch.zeros(1 << 20)}
    with pytest.raises(OSError, match="No space left"), replacing(disk / "a.safetensors") as path:
        save_file(tensors, path)
    with pytest.raises(OSError, match="No space left"), replacing_folder(disk / "folder") as path:
        save_file(tensors, path / "a.safetensors")
    assert [path.name for path in disk.iterdir()] == ["filler"]


# ---- the terminal

LOUD = """
import os, sys
from cdm_lightning.ends.streams import make_tolerant
make_tolerant()
for number in range(20000):
    print("a line on stdout", number)
    print("a line on stderr", number, file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("done")
"""
AWAY = {
    "its reader ends": "{python} 2>&1 | head -1",
    "a full disk": "{python} > /dev/full 2>&1",
    "a full disk for stderr": "{python} > /dev/null 2> /dev/full",
    "closed": "{python} >&- 2>&-",
    "all closed": "{python} <&- >&- 2>&-",
}


@pytest.mark.parametrize("way", AWAY)
def test_nobody_has_to_read_what_a_run_prints(tmp_path, way):
    (tmp_path / "loud.py").write_text(LOUD)
    command = f"{AWAY[way].format(python=f'{sys.executable} loud.py done')}; echo ${{PIPESTATUS[0]}} > status"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (tmp_path / "done").read_text() == "done"
    assert (tmp_path / "status").read_text() == "0\n"
    assert "Error" not in done.stderr


def test_a_stream_without_a_descriptor_is_left_alone():
    from cdm_lightning.ends.streams import TolerantStream

    text = io.StringIO()
    stream = TolerantStream(text)
    print("kept", file=stream, flush=True)
    assert text.getvalue() == "kept\n"
    text.close()
    print("lost", file=stream, flush=True)
