"""Functions that write a file or folder completely or not at all, even if the process is killed or the disk is full."""

import errno
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cdm_lightning.files.disk import disk_errors
from cdm_lightning.files.leftovers import OLD, hold, sweep, temporary_path


@contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """Yield a temporary path, to which the `with` block writes one file. After the block, this file replaces `path`.

    A crash leaves either the old file or the complete new one. The new file gets the mode of the old one. If
    `path` is a link, the file to which it points is replaced. After an error inside the block, `path` is unchanged and
    the temporary file is deleted.

    Raises OSError if the file cannot be written. If `path` exists and is not a regular file, OSError is raised before
    the block.
    """
    path = require_replaceable(path)
    sweep(path)
    temporary = temporary_path(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        hold(descriptor)
        mode = stat.S_IMODE((path.stat() if path.exists() else os.fstat(descriptor)).st_mode)
        with disk_errors():
            yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, require_replaceable(path))
        sync(path.parent)
    finally:
        os.close(descriptor)
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing_folder(path: str | Path) -> Generator[Path]:
    """Yield a new empty folder, to be filled in the `with` block. After the block, it becomes the folder `path`.

    If there is an earlier folder at `path`, the new one gets its mode, and the earlier one is deleted. If `path` is a
    link, the folder to which it points is replaced. After an error inside the block, `path` is unchanged and the new
    folder is deleted. Before the block, `sweep(path)` deletes or moves back the folders that killed writers left.

    Raises OSError if the folder cannot be written, or if `path` exists and is not a folder.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it exists and is not a folder", str(path))
    sweep(path)
    old = temporary_path(path, OLD)
    with scratch_folder(path) as temporary:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        _exchange(temporary, path, old)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(path: str | Path) -> Generator[Path]:
    """Yield a new empty folder next to `path`. It is deleted after the `with` block.

    If the process is killed inside the block, the next `sweep(path)` deletes the folder. Raises OSError if the folder
    cannot be made or written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        hold(descriptor)
        with disk_errors():
            yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(temporary: Path, path: Path, old: Path) -> None:
    """Rename `temporary` to `path`. A folder that is at `path` is renamed to `old`, and renamed back after an error."""
    if not path.exists():
        temporary.rename(path)
        return
    temporary.chmod(stat.S_IMODE(path.stat().st_mode))
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise


def require_replaceable(path: str | Path) -> Path:
    """Return `path` with all links followed, if it is a regular file or does not exist.

    Raises OSError for a folder, a device, a pipe or a socket, because `replacing` must not replace them.
    """
    path = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it exists and is not a regular file", str(path))
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file completely or not at all.

    Raises OSError if it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until the content of a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
