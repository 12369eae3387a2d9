"""Functions that recognise disk errors in the exceptions of any library, and that append to a text file safely."""

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cdm_lightning.files.reading import first_line, require_regular

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)  # disk errors that may be over when a run saves
DISK_ERROR = re.compile(r"I/?O error|No space left|quota exceeded|Read-only file system|os error \d+", re.IGNORECASE)


@contextmanager
def disk_errors() -> Generator[None]:
    """Turn an exception inside the `with` block into an OSError if it reports a disk error, such as a full disk.

    Other exceptions pass unchanged. `disk_error` decides what is a disk error.
    """
    try:
        yield
    except Exception as error:
        found = disk_error(error)
        if found is None or found is error:
            raise
        raise found from error


def disk_error(error: BaseException) -> OSError | None:
    """Return an OSError for the disk error that `error` reports, or None if it reports none.

    If `error` or its cause is an OSError, the result is this OSError. Otherwise, a new OSError is returned if the text
    of `error` mentions a disk error, such as "No space left". Libraries such as safetensors report disk errors only in
    this text.
    """
    for found in (error, error.__cause__):
        if isinstance(found, OSError):
            return found
    return OSError(first_line(error)) if DISK_ERROR.search(str(error)) else None


def append_text(path: str | Path, text: str) -> None:
    """Append lines to a UTF-8 text file completely or not at all, and wait until they are on the disk.

    If a crash has cut off the file's last line, a line break is added first. Raises OSError if `path` is a link or not
    a regular file, or if the lines cannot be written. After an error the file has its earlier content.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    with os.fdopen(descriptor, "a+b", buffering=0) as file:
        size = require_regular(path).stat().st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            text = f"\n{text}"
        left = memoryview(text.encode())
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
