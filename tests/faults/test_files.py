"""What is written replaces a regular file or a folder, in one step; what is read is a regular file; a name is a name."""

import ast
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from cdm_lightning import cache_text, extract_lora, plan, sample
from cdm_lightning.backbones.lora_file import locate_lora
from cdm_lightning.backbones.pipeline_folder import locate_index
from cdm_lightning.backbones.transformer_files import TransformerFiles
from cdm_lightning.callbacks.metrics import ValidationMetrics
from cdm_lightning.callbacks.sample_grid import SampleGrid
from cdm_lightning.checkpoint.single_file import check_file
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.data.images import CaptionedFolder
from cdm_lightning.data.prompts import PromptFile
from cdm_lightning.data.text_shards import shard_keys
from cdm_lightning.errors import UserError
from cdm_lightning.files import (
    leftovers,
    locked,
    open_regular,
    read_text,
    replacing,
    replacing_folder,
    require_name,
    sweep,
    sweep_folder,
    write_text,
)
from cdm_lightning.metrics.references import ImageFolder
from cdm_lightning.run.folder import Run

PACKAGE = Path(__file__).parents[2] / "src/cdm_lightning"


@contextmanager
def no_longer_than(seconds: int):
    """Whatever waits for ever raises instead."""

    def stop(*_: object) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state(path: Path) -> tuple[int, ...]:
    """What tells whether something was replaced or written; following a link changes the time of its last access only."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_rdev


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def full(path: Path) -> None:
    path.symlink_to("/dev/full")


def null(path: Path) -> None:
    path.symlink_to("/dev/null")


def chain(path: Path) -> None:
    path.with_name("first").symlink_to("/dev/zero")
    path.symlink_to("first")


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def itself(path: Path) -> None:
    path.symlink_to(path.name)


ODD = [fifo, unix_socket, zeros, full, null, chain, link_to_fifo]


@pytest.fixture(params=ODD, ids=lambda make: make.__name__)
def odd(request, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """`odd("a.png")` is something of that name which exists and is neither a regular file nor a folder."""
    monkeypatch.chdir(tmp_path)  # the address of a socket is short

    def made(name: str) -> Path:
        request.param(Path(name))
        return tmp_path / name

    return made


# ---- writing


def test_the_writer_refuses_whatever_is_no_regular_file(odd):
    path = odd("output")
    before = state(path)
    with pytest.raises(OSError, match="not a regular file"), no_longer_than(5), replacing(path):
        pytest.fail("the block ran")
    with pytest.raises(OSError, match="not a folder"), no_longer_than(5), replacing_folder(path):
        pytest.fail("the block ran")
    assert state(path) == before
    assert not [name for name in os.listdir() if name.startswith(leftovers.OWN)]


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["grid.png", "plan.json", "lora.safetensors", "all.safetensors"])
def test_so_does_every_command_before_it_works(make, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    make(Path(name))
    monkeypatch.setattr(sample, "sample_images", lambda *_, **__: pytest.fail("long work was begun"))
    monkeypatch.setattr(
        "cdm_lightning.backbones.transformer_files.TransformerFiles.__init__", lambda *_: pytest.fail("work")
    )
    commands = {
        "grid.png": lambda: sample.run(
            sample.parser().parse_args(["--model", "m", "--prompt", "p", "--output", str(path)])
        ),
        "plan.json": lambda: plan.write_json(path, []),
        "lora.safetensors": lambda: extract_lora.extract_lora("a", "b", 1, path),
        "all.safetensors": lambda: check_file(path),
    }
    before = state(path)
    with pytest.raises(UserError, match=name), no_longer_than(5):
        commands[name]()
    assert state(path) == before


def test_a_device_itself_is_refused(tmp_path):
    for device in ("/dev/full", "/dev/null", "/dev/stdout"):
        before = os.stat(device)
        if not stat.S_ISREG(before.st_mode):
            with pytest.raises(OSError, match="not a regular file"):
                write_text(device, "x")
            assert os.stat(device).st_rdev == before.st_rdev


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_the_mode_of_an_earlier_file_is_kept(mode, tmp_path):
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    with replacing(path) as temporary:
        temporary.unlink()  # some libraries write another file and rename it
        temporary.write_text("new")
        temporary.chmod(0o600)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "new"
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    folder.chmod(0o750)
    with replacing_folder(folder) as made:
        (made / "a").touch()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_a_new_file_has_the_mode_that_the_user_s_files_have(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_a_link(is_there, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere/file", tmp_path / "link"
    if is_there:
        target.touch()
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    folder, link = tmp_path / "elsewhere/folder", tmp_path / "link_to_folder"
    folder.mkdir()
    link.symlink_to(folder)
    with replacing_folder(link) as made:
        (made / "a").touch()
    assert link.is_symlink()
    assert os.listdir(folder) == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link", "link_to_folder"]


def test_a_link_to_itself_ends_in_an_error(tmp_path):
    itself(tmp_path / "link")
    with pytest.raises(OSError, match=r".+"):
        write_text(tmp_path / "link", "x")


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    write_text(tmp_path / ("ж" * 127), "x")
    with replacing_folder(tmp_path / ("x" * 255)) as made:
        (made / "a").touch()
    assert len(os.listdir(tmp_path)) == 2


def test_two_writers_with_the_same_process_number_do_not_meet(tmp_path, monkeypatch):
    """As in two containers that share a disk."""
    path = tmp_path / "file"
    with replacing(path) as one:
        monkeypatch.setattr(leftovers, "_place", lambda: "another")
        with replacing(path) as two:
            two.write_text("two")
            one.write_text("one")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_take_its_place_leaves_the_earlier_one(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), replacing_folder(folder) as made:
        (made / "new").touch()
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(folder) == ["old"]


# ---- leftovers

KILLED = """
import os, signal, sys
from cdm_lightning.files import replacing, replacing_folder
path, what, when = sys.argv[1:]
with {"file": replacing, "folder": replacing_folder}[what](path) as temporary:
    if what == "folder":
        (temporary / "weights").write_bytes(b"x" * 1000)
    else:
        temporary.write_bytes(b"x" * 1000)
    if when == "between":
        from pathlib import Path
        rename = Path.rename
        def once(self, target):
            rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = once
    else:
        print("in", flush=True)
        sys.stdin.read() if when == "waits" else os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(what, tmp_path):
    path = tmp_path / "student"
    others = [
        ".student.4711.tmp",
        ".student.4711.old",
        ".cdm_lightning-notes.tmp",
        "thesis.tmp",
        ".cdm_lightning-a-b-c-d.tmp",
    ]
    for name in others:
        (tmp_path / name).touch()
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, path, what, "now"], check=False, stdout=subprocess.DEVNULL)
    assert len(os.listdir(tmp_path)) == len(others) + 1  # the second has removed the first one's
    waiting = subprocess.Popen(
        [sys.executable, "-c", KILLED, path, what, "waits"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert waiting.stdout.read(2) == b"in"
    alive = set(os.listdir(tmp_path)) - set(others)
    assert len(alive) == 1  # it has removed the others'
    with {"file": replacing, "folder": replacing_folder}[what](path) as temporary:
        assert set(os.listdir(tmp_path)) == {*others, *alive, temporary.name}
        (temporary / "a" if what == "folder" else temporary).write_text("x")
    waiting.communicate()
    assert waiting.returncode == 0
    assert set(os.listdir(tmp_path)) == {*others, "student"}


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path):
    path = tmp_path / "student"
    path.mkdir()
    (path / "precious").touch()
    subprocess.run([sys.executable, "-c", KILLED, path, "folder", "between"], check=False)
    assert not path.exists()
    assert len(sweep(path)) == 2
    assert os.listdir(tmp_path) == ["student"]
    assert os.listdir(path) == ["precious"]


@pytest.mark.parametrize("seconds", [10, leftovers.ABANDONED + 10])
def test_what_another_machine_left_is_removed_after_an_hour_and_if_nobody_has_it_locked(seconds, tmp_path, monkeypatch):
    path = tmp_path / "student"
    monkeypatch.setattr(leftovers, "_place", lambda: "another")
    theirs = [leftovers.temporary_path(path) for _ in range(2)]
    monkeypatch.undo()
    for one in theirs:
        one.mkdir()
        os.utime(one, (time.time() - seconds,) * 2)
    descriptor = os.open(theirs[0], os.O_RDONLY)
    leftovers.hold(descriptor)
    assert sweep(path) == (theirs[1:] if seconds > leftovers.ABANDONED else [])
    os.close(descriptor)
    assert theirs[0].exists()


def test_a_link_with_the_name_of_a_leftover_does_not_lead_out(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis").touch()
    (tmp_path / "cache").mkdir()
    left = leftovers.temporary_path(tmp_path / "cache/x")
    left.with_name(left.name.replace(str(os.getpid()), "999999999")).symlink_to(tmp_path / "home")
    sweep_folder(tmp_path / "cache")
    sweep(tmp_path / "cache/x")
    assert os.listdir(tmp_path / "home") == ["thesis"]


@pytest.mark.parametrize("name", ["thesis/chapter.tmp", "chapter.tmp", ".bashrc", "shards.zip", "x.safetensors"])
def test_a_folder_that_is_no_text_cache_is_left_alone(name, tmp_path):
    file = tmp_path / "home" / name
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(UserError, match="is no text cache, since it holds"), cache_text.writing(tmp_path / "home"):
        pytest.fail("the block ran")
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_text_cache_that_is_new_or_begun_or_finished_is_opened(is_there, tmp_path):
    folder = tmp_path / "cache"
    if is_there:
        (folder / "shards").mkdir(parents=True)
    for _ in range(2):
        with cache_text.writing(folder):
            pass
    (folder / "text_cache.json").touch()
    (folder / "notes.tmp").touch()
    with cache_text.writing(folder):
        pass
    assert (folder / "notes.tmp").exists()


# ---- locks


@pytest.mark.parametrize("make", [*ODD, itself, "text", "hard link"], ids=lambda make: getattr(make, "__name__", make))
def test_a_lock_file_that_is_something_else_is_refused_and_unchanged(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "precious"
    file.write_text("ssh-ed25519 AAAA me")
    path = tmp_path / ".lock"
    if make == "text":
        path.write_text("my own file\n")
    elif make == "hard link":
        path.hardlink_to(file)
    else:
        make(Path(".lock"))
    before = state(path)
    with (
        pytest.raises(OSError, match=r"is a link; remove it|is not a lock file|No such device"),
        no_longer_than(5),
        locked(path),
    ):
        pytest.fail("the block ran")
    assert state(path) == before
    assert file.read_text() == "ssh-ed25519 AAAA me"


def test_a_lock_file_that_is_a_link_to_a_file_is_refused_in_one_line(tmp_path):
    file, path = tmp_path / "precious", tmp_path / ".lock"
    file.write_text("all I have")
    path.symlink_to(file)
    with pytest.raises(OSError, match="link"), locked(path):
        pytest.fail("the block ran")
    assert file.read_text() == "all I have"
    path.unlink()
    for _ in range(2):  # the second start finds the first one's file
        with locked(path):
            assert path.read_text().startswith(f"process {os.getpid()} on ")


# ---- reading


def test_the_reader_refuses_whatever_is_no_regular_file(odd):
    path = odd("input")
    with pytest.raises(OSError, match=r"not a regular file|No such device"), no_longer_than(5):
        open_regular(path)


def test_the_reader_bounds_the_size(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no space
    with pytest.raises(OSError, match="1,099,511,627,776 bytes, more than 67,108,864"):
        read_text(path)


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name",
    [
        *("prompts.txt", "prompts.jsonl", "prompts.json", "prompts.csv", "prompts.parquet", "folder/prompts.txt"),
        *("all.safetensors", "iteration_0000001/state.json", "iteration_0000001/COMPLETE.json"),
        *("images/metadata.jsonl", "images/a.png", "references/a.png", "lora.safetensors", "run/config.yaml"),
        *(
            "run/metrics.json",
            "pipeline/model_index.json",
            "pipeline/transformer/config.json",
            "transformer/a.safetensors",
        ),
        "pipeline/tokenizer/deep/vocab.json",
        *("shards/a.safetensors",),
    ],
)
def test_every_path_that_is_read_is_a_regular_file(make, name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(path.parent)
    make(Path(path.name))
    monkeypatch.chdir(tmp_path)
    if name.startswith("iteration") and not name.endswith("COMPLETE.json"):
        (path.parent / "COMPLETE.json").write_text(json.dumps({"files": {}}))
    if name == "images/a.png":
        (path.parent / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    run = Run(tmp_path / "run")
    readers: dict[str, Callable[[], object]] = {
        "prompts": lambda: PromptFile(path),
        "folder": lambda: PromptFile(path.parent),
        "all": lambda: read_checkpoint(path),
        "iteration_0000001": lambda: read_checkpoint(path.parent),
        "images": lambda: CaptionedFolder(path.parent, [8, 8]).image(0),
        "references": lambda: list(ImageFolder(path.parent)),
        "lora": lambda: locate_lora(path),
        "run": run.config if name.endswith("yaml") else run.metrics,
        "pipeline": lambda: locate_index(str(tmp_path / "pipeline"), None),
        "transformer": lambda: TransformerFiles(str(tmp_path)),
        "shards": lambda: shard_keys(path, None),
    }
    with pytest.raises(UserError) as refused, no_longer_than(5):
        readers[name.partition("/")[0].partition(".")[0]]()
    assert "\n" not in str(refused.value)


OPENERS = {"open", "read_text", "read_bytes", "safe_open", "load_file", "safe_load"}
ALLOWED = {  # what else opens files by itself: files that this package has just written, or that an own check precedes
    "__init__.py": {"read_text"},  # the checkout's own pyproject.toml
    "checkpoint/health.py": {"safe_open"},  # files of a checkpoint that has been opened
    "config/origin.py": {"read_text", "safe_load"},  # the user's own configuration files
    "config/secrets.py": {"safe_load"},  # what Hydra has just written
    "backbones/lora_file.py": {"load_file"},  # after `locate_lora`
    "backbones/transformer_files.py": {"safe_open"},  # after `require_regular` of each file
    "backbones/whole_folder.py": {"safe_open"},  # after `require_contents`
    "callbacks/loggers.py": {"read_text"},  # the run's own rows
    "ends/streams.py": {"open"},  # /dev/null
    "checkpoint/folder.py": {"open"},  # writes
    "checkpoint/tensors.py": {"open"},  # writes
    "checkpoint/stored.py": {"safe_open"},  # `require_regular`
    "data/text_shards.py": {"safe_open"},  # `require_regular`
    "evaluation/store.py": {"safe_open"},  # `require_regular`
    "evaluation/thumbnails.py": {"open"},  # PIL, of bytes in memory
    "data/image_cache.py": {"safe_open"},  # `require_regular`
    "data/formats.py": {
        "read_text"
    },  # with another encoding, after `holds_lines` has opened it and its size was compared
    "data/images.py": {"open"},  # PIL, `require_regular`
    "metrics/references.py": {"open"},  # PIL, `require_regular`
    "metrics/weights_file.py": {"load_file"},  # `require_regular`
    "metrics/frechet.py": {"load_file"},  # statistics that the user names
    "metrics/scenes_judge.py": {"load_file"},  # `require_regular`
    "metrics/shapes_classifier.py": {"load_file"},  # bundled
    "planning/skeleton.py": {"read_text", "safe_open"},  # bundled, and after `locate_pipeline`
    "distributed/launch.py": {"read_text"},  # its own private folder
    "run/record.py": {"open"},  # writes
}


def openers(tree: ast.AST) -> set[str]:
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = {
        (func.attr, func) if isinstance(func, ast.Attribute) else (getattr(func, "id", ""), func) for func in called
    }
    ours = {"read_text"}  # the function of `files` has no object before it
    return {name for name, func in names if name in OPENERS and not (name in ours and isinstance(func, ast.Name))}


def test_small_files_are_read_by_the_one_reader():
    found = {
        path.relative_to(PACKAGE).as_posix(): openers(ast.parse(path.read_text()))
        for path in PACKAGE.rglob("*.py")
        if path.parts[-2] not in ("files", "pretraining")
    }
    assert {name: of - ALLOWED.get(name, set()) for name, of in found.items() if of - ALLOWED.get(name, set())} == {}
    assert openers(ast.parse("path.read_text()")) == {"read_text"}
    assert openers(ast.parse("read_text(path)")) == set()


# ---- names


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "a/b",
        "/a",
        "../x",
        "a/",
        "a\\b",
        "a\nb",
        "a\0b",
        "\x1b[2J",
        "x" * 256,
        "ж" * 128,
        None,
        True,
        [],
        {},
    ],
    ids=repr,
)
def test_a_name_is_one_component_of_a_path(name):
    for make in (
        lambda: require_name(name, "run_name"),
        lambda: SampleGrid(folder=name),
        lambda: ValidationMetrics(None, folder=name),
    ):
        with pytest.raises(UserError, match="must be a name") as refused:
            make()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["cdm", "a b", "ж" * 127, "1.5", 3, "..a", "-x", "a=b,c", "ü#"])
def test_names_that_are_fine(name):
    assert require_name(name, "run_name") == str(name)


@pytest.mark.parametrize("name", ["../../x", "''"])
def test_a_run_s_folder_is_named_by_its_name_alone(name, tmp_path, monkeypatch, capsys):
    from cdm_lightning.train import main

    monkeypatch.chdir(tmp_path)
    for more in ([], ["-m"]):
        monkeypatch.setattr(sys, "argv", ["train", "experiment=toy2d_cdm", f"run_name={name}", *more])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: run_name=")
    assert os.listdir(tmp_path) == []


def test_a_picture_is_still_written(tmp_path):
    sample.write_picture(Image.new("RGB", (2, 2)), tmp_path / "new/grid.png")
    assert Image.open(tmp_path / "new/grid.png").size == (2, 2)
