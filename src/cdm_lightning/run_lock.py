"""One run a folder at a time: a second one would delete what the first is writing."""

import errno
import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from cdm_lightning.config import process_number
from cdm_lightning.errors import UserError

LOCK_FILE = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def only_run_in(folder: Path) -> Generator[None]:
    """Hold the folder's lock inside the block; UserError if a process of another run holds it.

    The first process of a run holds it for all. It is the system's record lock (`fcntl`): it goes with the process however
    that ends, loader workers do not inherit it, and it reaches over network file systems. Where the file system knows no
    locks, nothing is locked.
    """
    if process_number():
        yield
        return
    with locked_file(folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"{folder}: another run is at work in this folder ({holder}); wait for it, stop it, or set another run_name"
                ) from error
        file.truncate(0)
        with suppress(OSError):  # a full disk: the lock is held all the same
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def locked_file(folder: Path) -> TextIO:
    """The file that is locked, open; UserError if it cannot be made."""
    try:
        return (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); set another run_name") from error
