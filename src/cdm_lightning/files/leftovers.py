"""The temporary files and folders of the package: their names, and how those of killed processes are found and deleted."""

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
ABANDONED = 3600  # seconds without a change after which an unlocked leftover of another machine is one


def temporary_path(path: Path, end: str = NEW) -> Path:
    """Return a new temporary path next to `path`; its name is short, whatever the name of `path`, and no other has it.

    It tells the machine and the process, because processes in two containers on one disk can have the same number.
    """
    return path.with_name(f"{OWN}{_digest(path)}-{_place()}-{os.getpid()}-{secrets.token_hex(4)}{end}")


def hold(descriptor: int) -> None:
    """Lock an open temporary file or folder, so that no other process takes it for a leftover; it is held until it is closed."""
    with suppress(OSError):  # a file system without locks: `is_left` then looks for the process
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def sweep(path: str | Path) -> list[Path]:
    """Delete what killed writers of `path` left next to it, and return the paths; nothing that is in use or of others.

    If one was killed while it replaced an earlier folder, that folder is put back.
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
    """Delete what killed writers of any file directly inside `folder` left there, and return the paths."""
    found = [entry for entry in _entries(Path(folder), OWN, (NEW,)) if is_left(entry)]
    for entry in found:
        _delete(entry)
    return found


def is_left(entry: Path) -> bool:
    """Return whether a temporary file or folder was made here and no process writes it any more; False if in doubt.

    That is so if its process is dead on this machine and nothing has it locked. Of another machine or container it must be
    unlocked, on a file system with locks, and unchanged for an hour.
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
    """Return a short hash of the machine and, in containers, of the process namespace: where a process number counts."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.blake2b(f"{socket.gethostname()} {namespace}".encode(), digest_size=4).hexdigest()
