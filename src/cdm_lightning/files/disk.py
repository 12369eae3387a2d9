"""Errors of the disk, in whatever exception they come, and lines that are appended whole or not at all."""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cdm_lightning.files.reading import first_line, require_regular

DISK_ERROR = re.compile(r"I/?O error|No space left|quota exceeded|Read-only file system|os error \d+", re.IGNORECASE)


@contextmanager
def disk_errors() -> Generator[None]:
    """Turn an exception inside the block that reports a disk error, such as a full disk, into an OSError (see `disk_error`).

    Other exceptions pass unchanged.
    """
    try:
        yield
    except Exception as error:
        found = disk_error(error)
        if found is None or found is error:
            raise
        raise found from error


def disk_error(error: BaseException) -> OSError | None:
    """Return `error` or its cause if that is an OSError, a new OSError if its text speaks of the disk, and None otherwise.

    Libraries that are not written in Python (safetensors) report a full disk in their own exceptions, as text.
    """
    for found in (error, error.__cause__):
        if isinstance(found, OSError):
            return found
    return OSError(first_line(error)) if DISK_ERROR.search(str(error)) else None


def append_text(path: str | Path, text: str) -> None:
    """Append lines to a text file (UTF-8) completely or not at all, and wait until they are on the disk.

    If the file does not end with a line break, because a crash cut its last line off, one is added first. Raises OSError
    if `path` is a link or not a regular file, or if the lines cannot be written; the file then keeps its earlier content.
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
