"""Files and folders that are written completely or not at all, even if the process is killed or the disk is full."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """Yield a temporary path for the block to write one file to; afterwards the file is renamed to `path`.

    The content is on the disk before the file is renamed, so a crash leaves either the old or the new file. After an error
    inside the block, `path` is unchanged and the temporary file is deleted. Raises OSError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing_folder(path: str | Path) -> Generator[Path]:
    """Yield a new empty folder next to `path` and rename it to `path` at the end; an earlier folder there is deleted.

    After an error inside the block, `path` is unchanged and the new folder is deleted. Raises OSError if the folder cannot be
    written.
    """
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in temporary.rglob("*"):
            sync(written)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: str | Path) -> Generator[None]:
    """Hold a lock on the lock file `path` inside the block.

    Raises BlockingIOError, whose `strerror` names the holder, if another process holds the lock, and OSError if the file
    cannot be made. The lock is a record lock of the system (`lockf`). It is released when the process ends, however it ends;
    child processes do not inherit it, unlike a lock of the filelock package; and it works on network file systems. On a file
    system without locks, nothing is locked.
    """
    with Path(path).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise BlockingIOError(error.errno, file.read().strip() or "an unknown process") from error
        with suppress(OSError):  # the disk may be full; the lock is held nevertheless
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) completely or not at all; raise OSError if it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop, or the error's type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
