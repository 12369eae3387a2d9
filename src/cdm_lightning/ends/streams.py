"""Streams for stdout and stderr that raise no errors when a pipe or terminal is closed or a disk is full."""

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET, errno.EBADF)  # nobody will ever read what is written


class TolerantStream:
    """A text stream that writes to `stream` and raises no OSError. Text that cannot be written is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text if possible, and return its length in any case."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line if possible."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write buffered text if possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: Exception) -> None:
        """Redirect the stream to /dev/null if its reader is gone. After other errors, writing may work again later."""
        if isinstance(error, OSError) and error.errno in GONE:
            with suppress(OSError, ValueError, AttributeError):
                _to_null(self._stream.fileno())


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def make_tolerant() -> None:
    """Replace `sys.stdout` and `sys.stderr` by `TolerantStream`s, and open /dev/null where descriptor 0, 1 or 2 is closed.

    If a descriptor stayed closed, the next file that is opened would get its number, and the messages that C libraries
    write to stdout or stderr would go into that file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _to_null(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  it stays open until the process ends
        if not isinstance(stream, TolerantStream):
            setattr(sys, name, TolerantStream(stream))


@contextmanager
def tolerant_streams() -> Generator[None]:
    """Apply `make_tolerant` inside the `with` block, and restore `sys.stdout` and `sys.stderr` after it."""
    before = sys.stdout, sys.stderr
    make_tolerant()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
