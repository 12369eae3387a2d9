"""The temporary files and folders of this package: their names, and the deletion of those whose writers were killed."""

import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

OWN = ".cdm_lightning-"  # how the names of all temporary files and folders begin
NEW, OLD = ".tmp", ".old"  # how they end: what is being written, and what is being replaced
ABANDONED = 3600  # seconds without a change after which an unlocked file of another machine is deleted


def temporary_path(path: Path, end: str = NEW) -> Path:
    """Return a new, unique path next to `path` for a temporary file or folder. Nothing is created.

    The name ends with `end` and is short even if the name of `path` is long. It contains a hash of the name of `path`, a hash
    of the machine, and the process number. The machine matters because processes in two containers can have the same number.
    """
    return path.with_name(f"{OWN}{_digest(path)}-{_place()}-{os.getpid()}-{secrets.token_hex(4)}{end}")


def hold(descriptor: int) -> None:
    """Lock the temporary file or folder that is open as `descriptor`, until `descriptor` is closed.

    The lock shows other processes that the writer still runs.
    """
    with suppress(OSError):  # a file system without locks: `is_left` then looks for the process
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def sweep(path: str | Path) -> list[Path]:
    """Delete the temporary files and folders for `path` whose writers were killed, and return their paths.

    The temporary files for `path` are in the same folder as `path` (see `temporary_path`). Temporary files of running
    writers and of other paths stay. If a writer was killed while it replaced an earlier folder, the earlier folder is
    moved back to `path`.
    """
    path = Path(os.path.realpath(path))
    found = [entry for entry in _entries(path.parent, f"{OWN}{_digest(path)}-", (NEW, OLD)) if is_left(entry)]
    for entry in found:
        if entry.suffix == OLD and not path.exists():
            with suppress(OSError):
                entry.rename(path)
        else:
            _delete(entry)
    return found


def sweep_folder(folder: str | Path) -> list[Path]:
    """Delete the temporary files and folders inside `folder` whose writers were killed, and return their paths.

    Subfolders are not searched. If a writer was killed while it replaced an earlier folder, the earlier folder is not
    deleted, so that `sweep` can move it back.
    """
    found = [entry for entry in _entries(Path(folder), OWN, (NEW,)) if is_left(entry)]
    for entry in found:
        _delete(entry)
    return found


def is_left(entry: Path) -> bool:
    """Return whether a temporary file or folder may be deleted, because the process that was writing it has ended.

    - If another process holds a lock on it, the answer is no.
    - If it was made on this machine, the answer is yes if the process that made it no longer runs.
    - If it was made on another machine or in another container, the answer is yes if it has not changed for an hour
      and the file system has locks. Without locks, a running writer could not be recognised.
    - In doubt, the answer is no.
    """
    parts = entry.stem.removeprefix(OWN).split("-")
    if len(parts) != 4 or not parts[2].isdecimal():
        return False
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        can_lock = True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        can_lock = False
    finally:
        age = time.time() - os.fstat(descriptor).st_mtime
        os.close(descriptor)
    if parts[1] == _place():
        return not _is_alive(int(parts[2]))
    return can_lock and age > ABANDONED


def _entries(folder: Path, begin: str, ends: tuple[str, ...]) -> list[Path]:
    try:
        return [
            Path(entry.path)
            for entry in os.scandir(folder)
            if entry.name.startswith(begin) and entry.name.endswith(ends)
        ]
    except OSError:
        return []


def _delete(entry: Path) -> None:
    with suppress(OSError):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _digest(path: Path) -> str:
    return hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()


@cache
def _place() -> str:
    """Return a short hash of the machine and of its process namespace, which is that of the container.

    Process numbers are unique only within one process namespace.
    """
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.blake2b(f"{socket.gethostname()} {namespace}".encode(), digest_size=4).hexdigest()
