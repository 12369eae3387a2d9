"""A lock that one process holds on a lock file."""

import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

HOLDER = re.compile(rb"process \d+ on \S*")  # what a lock file holds
LONGEST = 512  # bytes of it that are read


@contextmanager
def locked(path: str | Path) -> Generator[None]:
    """Hold a lock on the lock file `path` inside the block, so that one process at a time runs it; the file is made if missing.

    Raises BlockingIOError at once, whose `strerror` names the holder ("process 12 on HOST"), if another process holds the
    lock, and OSError if the file cannot be made, or is a link, a device or a file with content that is not of a lock file.
    The lock is one of POSIX (`lockf`). It is released when the process ends, however it ends; child
    processes do not inherit it, unlike a lock of the filelock package; and it works on network file systems. On a file
    system without locks, nothing is locked.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, f"{Path(path).name} is a link; remove it", str(path)) from error
        raise
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        written = file.read(LONGEST) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b"-"
        if written and not HOLDER.fullmatch(written):
            raise OSError(errno.EINVAL, f"{Path(path).name} is no lock file of this program; remove it", str(path))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, written.decode() or "an unknown process") from error
        with suppress(OSError):  # the disk may be full; the lock is held nevertheless
            file.truncate(0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
