"""Checkpoint folders: whole or not there, verified before use, safe to read, in one file on demand."""

import json
import os
import pickle
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_equal_states

from cdm_lightning import export
from cdm_lightning.checkpoint import save
from cdm_lightning.checkpoint.callback import IterationCheckpoint
from cdm_lightning.checkpoint.folder import MARKER, checkpoints_in
from cdm_lightning.checkpoint.stored import newest_checkpoint, read_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.errors import UserError
from cdm_lightning.module import CDMModule
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.train import train

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.fixture(scope="module")
def template(toy_overrides, tmp_path_factory) -> Path:
    """A run of 10 iterations with checkpoints of 5 and 10; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "template"
    quiet_libraries()
    train(compose([f"output_dir={folder}", *toy_overrides, "checkpoint.every=5"]))
    return folder


@pytest.fixture
def finished(template: Path, tmp_path: Path) -> Path:
    """A copy of the run, which `toy_run("checkpoint.every=5")` goes on with."""
    return Path(shutil.copytree(template, tmp_path / "run"))


# ---- what is on the disk


def test_the_folder_holds_tensors_record_and_marker(template):
    path = checkpoints_in(template / "checkpoints")[-1]
    assert {file.name for file in path.iterdir()} == {SHARD, "state.json", "trainer.pt", "run.json", MARKER}
    sums = json.loads((path / MARKER).read_text())["files"]
    assert {name: of["bytes"] for name, of in sums.items()} == {
        file.name: file.stat().st_size for file in path.iterdir() if file.name != MARKER
    }
    record = read_checkpoint(path).record
    assert (record["iteration"], record["world_size"], record["skipped_in_a_row"]["student"]) == (10, 1, 0)
    assert load_file(path / SHARD).keys() == read_checkpoint(path).sizes.keys()


def test_small_files_hold_the_same(template, toy_run, monkeypatch):
    whole = checkpoints_in(template / "checkpoints")[-1]
    monkeypatch.setattr("cdm_lightning.checkpoint.tensors.FILE_BYTES", 1000)
    toy_run("trainer.max_steps=5")
    split = toy_run().checkpoint
    assert len(list(split.glob("*.safetensors"))) > 3
    assert_equal_states(whole, split)


def test_the_best_one_stays(toy_run, monkeypatch):
    values = iter([3.0, 1.0, 2.0, float("nan"), 2.5])

    def validating(self):
        self.log("step", float(self.iteration))
        self.log("val/score", next(values))

    monkeypatch.setattr(CDMModule, "on_validation_epoch_end", validating)
    monkeypatch.setattr(
        "cdm_lightning.checkpoint.best.Best.check", lambda *_: None
    )  # it knows the metrics of `metric` alone
    often = (
        "trainer.limit_val_batches=1.0",
        "trainer.val_check_interval=2",
        "data.val_prompts=1",
        "validation.samplers=[]",
    )
    result = toy_run(*often, "checkpoint.every=5", "checkpoint.keep=1", "checkpoint.best=val/score")
    assert [path.name for path in checkpoints_in(result.folder / "checkpoints")] == [
        "iteration_0000004",
        "iteration_0000010",
    ]
    best = json.loads((result.folder / "checkpoints/best.json").read_text())
    assert best == {"metric": "val/score", "value": 1.0, "iteration": 4}
    again = toy_run(f"resume={result.folder}/checkpoints/iteration_0000004", folder="fork")
    assert_equal_states(result.checkpoint, again.checkpoint)


def test_an_unknown_best_metric_is_refused(toy_run):
    often = ("trainer.limit_val_batches=1.0", "trainer.val_check_interval=2", "data.val_prompts=1")
    with pytest.raises(UserError, match=r"checkpoint.best=val/score must be a figure that validation logs"):
        toy_run(*often, "checkpoint.best=val/score")


# ---- damage


DAMAGES = {
    f"{SHARD} is truncated: ": lambda path: (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1000]),
    f"{SHARD} is damaged: its checksum is wrong": lambda path: flip_a_bit(path / SHARD),
    f"{SHARD} is missing": lambda path: (path / SHARD).unlink(),
    f"this is an unfinished checkpoint, without {MARKER}": lambda path: (path / MARKER).unlink(),
    "COMPLETE.json cannot be read": lambda path: (path / MARKER).write_text("{}"),
    "trainer.pt is damaged: its checksum is wrong": lambda path: flip_a_bit(path / "trainer.pt"),
}


@pytest.mark.parametrize("why", DAMAGES)
def test_a_damaged_checkpoint_is_told_from_a_good_one(finished, why):
    older, newest = checkpoints_in(finished / "checkpoints")
    DAMAGES[why](newest)
    refused = []
    assert newest_checkpoint(newest.parent, lambda *of: refused.append(of)).path == older
    assert [path for path, _ in refused] == [newest]
    assert refused[0][1].startswith(f"{newest}: {why}")


def test_a_run_goes_on_from_the_one_before_and_says_so(finished, template, toy_run, capfd):
    older, newest = checkpoints_in(finished / "checkpoints")
    flip_a_bit(newest / SHARD)
    (newest.parent / ".saving_iteration_0000007").mkdir()  # what a killed save leaves
    resumed = toy_run("checkpoint.every=5")
    said = capfd.readouterr().err
    assert "deleted the remains of an interrupted save: .saving_iteration_0000007" in said
    assert f"skipped a checkpoint: {newest}: {SHARD} is damaged: its checksum is wrong" in said
    assert f"resuming from {older} (iteration 5)" in said
    assert_equal_states(template / "checkpoints/iteration_0000010", resumed.checkpoint)
    left = {path.name for path in newest.parent.iterdir()}
    assert left == {".lock", older.name, newest.name, "unused_iteration_0000010"}


def test_files_with_the_names_of_folders_are_in_nobodys_way(finished, toy_run):
    names = (
        ".saving_iteration_0000007",
        ".saving_iteration_0000012",
        ".removing_iteration_0000005",
        "iteration_0000012",
    )
    for name in names:
        (finished / "checkpoints" / name).touch()
    (finished / "checkpoints/.saving_photos").mkdir()  # somebody else's
    assert toy_run("trainer.max_steps=12", "checkpoint.every=5", "checkpoint.keep=1").iteration == 12
    left = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert left == [".lock", ".saving_photos", "iteration_0000012"]
    assert (finished / "checkpoints/iteration_0000012").is_dir()


def test_nothing_but_damaged_checkpoints_is_refused(finished, toy_run):
    for path in checkpoints_in(finished / "checkpoints"):
        flip_a_bit(path / SHARD)
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        toy_run("checkpoint.every=5")


# ---- a full disk


class Tmpfs:
    """A file system of 2 MB that can be filled to the last byte."""

    def __init__(self, path: Path) -> None:
        self.path, self.filler = path, path / "filler"

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1 << 9, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)


class FullDevice:
    """Where no file system may be mounted: shards are written to /dev/full while the "disk" is full."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.full, original = path, False, save.begin

        def begin(folder: Path, iteration: int) -> Path:
            made = original(folder, iteration)
            if self.full:
                (made / SHARD).symlink_to("/dev/full")
            return made

        monkeypatch.setattr(save, "begin", begin)

    def fill(self) -> None:
        self.full = True

    def free(self) -> None:
        self.full = False


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tmpfs | FullDevice]:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):  # only root may
        yield FullDevice(disk, monkeypatch)
    else:
        yield Tmpfs(disk)
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_during_a_save_does_not_stop_the_run(template, toy_run, small_disk, monkeypatch, capfd):
    original = CDMModule.training_step

    def crowded(self, *batch):
        if self.iteration == 5:
            small_disk.fill()
        if self.iteration == 9:
            small_disk.free()
        original(self, *batch)

    monkeypatch.setattr(CDMModule, "training_step", crowded)
    place = (f"output_dir={small_disk.path}/run", "logger=none", "checkpoint.every=2")
    result = toy_run(*place)
    said = capfd.readouterr().err
    for iteration in (6, 8):
        assert f"WARNING: the checkpoint of iteration {iteration} could not be written to {small_disk.path}/run" in said
    assert "No space left on device" in said
    assert "iteration_0000004 is intact" in said
    left = small_disk.path / "run/checkpoints"
    assert sorted(path.name for path in left.iterdir()) == [".lock", "iteration_0000004", "iteration_0000010"]
    assert read_checkpoint(left / "iteration_0000004").find_fault() is None
    assert_equal_states(template / "checkpoints/iteration_0000010", result.checkpoint)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(template, toy_run, small_disk, monkeypatch):
    original = CDMModule.training_step

    def crowded(self, *batch):
        if self.iteration == 5:
            small_disk.fill()
        original(self, *batch)

    place = (f"output_dir={small_disk.path}/run", "logger=none", "checkpoint.every=4")
    monkeypatch.setattr(CDMModule, "training_step", crowded)
    with pytest.raises(
        UserError, match=r"iteration 10 could not be written.*iteration_0000004 is intact; free disk space"
    ):
        toy_run(*place)
    small_disk.free()
    monkeypatch.setattr(CDMModule, "training_step", original)
    assert_equal_states(template / "checkpoints/iteration_0000010", toy_run(*place).checkpoint)


# ---- code inside


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def reseal(path: Path) -> None:
    """Make sizes and checksums right again, as someone would who means harm."""
    files = [file for file in path.iterdir() if file.name != MARKER]
    sums = {file.name: {"bytes": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())} for file in files}
    (path / MARKER).write_text(json.dumps({"files": sums}))


@pytest.mark.parametrize("name", ["trainer.pt", SHARD])
@pytest.mark.parametrize("write", [lambda content, file: file.write_bytes(pickle.dumps(content)), torch.save])
def test_a_checkpoint_with_code_inside_is_refused(finished, tmp_path, name, write):
    path = checkpoints_in(finished / "checkpoints")[-1]
    trap = tmp_path / "trap"
    write({"fit_loop": Payload(trap), "callbacks": {}}, path / name)
    reseal(path)
    callback = IterationCheckpoint(path.parent)
    with pytest.raises(UserError, match=r"holds objects that are not safe to load|not a cdm_lightning checkpoint"):
        callback.choose_start(read_checkpoint(path.with_name("iteration_0000005")).record["fingerprint"])
    assert not trap.exists()


def test_an_index_with_code_inside_is_not_looked_at(finished, tmp_path, toy_run):
    """Where torch's own form of sharded checkpoints has a pickle."""
    path = checkpoints_in(finished / "checkpoints")[-1]
    (path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "trap")))
    reseal(path)
    assert toy_run("checkpoint.every=5", "trainer.max_steps=11").iteration == 11
    assert not (tmp_path / "trap").exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


# ---- one file


def test_a_single_file_holds_all_and_a_run_begins_with_it(template, toy_run, tmp_path, capsys):
    half, whole = checkpoints_in(template / "checkpoints")
    single = tmp_path / "half.safetensors"
    export.main([str(half), "--output", str(single), "--form", "checkpoint"])
    assert capsys.readouterr().out == f"exported checkpoint: {single}\n"
    assert_equal_states(half, single)
    assert_equal_states(whole, toy_run(f"resume={single}", folder="fork").checkpoint)
    with pytest.raises(UserError, match="must be a new file name"):
        export.export_checkpoint(template, single, form="checkpoint")
    single.write_bytes(single.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        read_checkpoint(single)


def test_weights_alone(template, tmp_path):
    stored = read_checkpoint(checkpoints_in(template / "checkpoints")[-1])
    for weights, dtype in (("student", torch.float32), ("student_ema", torch.bfloat16)):
        output = tmp_path / f"{weights}.safetensors"
        name = str(dtype).removeprefix("torch.")
        assert export.export_checkpoint(template, output, weights=weights, dtype=name, form="weights") == output
        expected = stored.network_weights(weights)
        found = load_file(output)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key].to(dtype)) for key in found)
    assert not torch.equal(*(next(iter(stored.network_weights(n).values())) for n in ("student", "student_ema")))


def test_a_file_that_cannot_be_written(template, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export.export_checkpoint(template, tmp_path / "file/all.safetensors", form="checkpoint")
