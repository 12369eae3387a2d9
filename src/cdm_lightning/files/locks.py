"""A lock by which one process at a time uses a file or folder."""

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
LONGEST = 512  # bytes of a lock file that are read


@contextmanager
def locked(path: str | Path) -> Generator[None]:
    """Hold a lock on the lock file `path` inside the `with` block, so that one process at a time runs the block.

    The lock file is created if it is missing. The lock ends with the process, even if the process is killed. Child
    processes do not inherit it, unlike a lock of the package filelock. It is a POSIX lock (`lockf`), which also works
    on network file systems. On a file system without locks, the block runs without one.

    Raises BlockingIOError at once if another process holds the lock. The error's `strerror` names that process, as in
    "process 12 on HOST". Raises OSError if `path` cannot be created, or is a link, a device, or a file that is not a
    lock file.
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
            raise OSError(errno.EINVAL, f"{Path(path).name} is not a lock file of this program; remove it", str(path))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, written.decode() or "an unknown process") from error
        with suppress(OSError):  # the disk may be full; the lock is held nevertheless
            file.truncate(0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
