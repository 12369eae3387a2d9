"""The masking of secrets in everything that a process prints: messages, tracebacks, warnings, and lines of libraries."""

import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from threading import RLock
from typing import Any, TextIO

from cdm_lightning.terminal.secrets import masked_text

LONGEST_LINE = 10_000  # characters of an unfinished line that are kept


class MaskedStream:
    """A text stream that replaces secrets by *** before it writes to `stream`.

    A line is masked as a whole, even if it is written in pieces; `print("token:", token)`, for example, writes several
    pieces. Therefore this stream holds a line back until it is complete, or until `flush` is called. All attributes
    that are not defined here are those of `stream`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._line = ""  # the unfinished line, unmasked
        self._shown = ""  # the part of the masked line that `stream` already has
        self._lock = RLock()  # a signal handler may print within a write

    def write(self, text: str) -> int:
        """Append `text` to the unfinished line, mask and write all complete lines, and return the length of `text`."""
        with self._lock:
            self._line += text
            end = max(self._line.rfind("\n"), self._line.rfind("\r")) + 1
            if end:
                ended, self._line = self._line[:end], self._line[end:]
                shown, self._shown = self._shown, ""
                self.stream.write(_after(shown, masked_text(ended)))
            elif len(self._line) > LONGEST_LINE:
                self._show()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts with their secrets masked."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write the unfinished last line, with its secrets masked, and flush `stream`."""
        with self._lock:
            self._show()
            self.stream.flush()

    def _show(self) -> None:
        """Write the new part of the unfinished line to `stream`. The line is masked as a whole again when more text follows."""
        if not self._line:
            return
        shown, self._shown = self._shown, masked_text(self._line)
        if rest := _after(shown, self._shown):
            self.stream.write(rest)
        if len(self._line) > LONGEST_LINE:
            self._line = self._shown = ""

    def __iter__(self) -> Any:
        return iter(self.stream)

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "detach", "close"):  # earlier text must be written before text that bypasses this stream
            self.flush()
        return getattr(self.stream, name)


def _after(shown: str, text: str) -> str:
    """Return the part of a masked line, `text`, that must still be written after its earlier state `shown`.

    More text can reveal that a secret began in `shown`. Then the result begins where the two texts first differ.
    """
    if text.startswith(shown):
        return text[len(shown) :]
    alike = next(
        (place for place, (one, other) in enumerate(zip(shown, text)) if one != other), min(len(shown), len(text))
    )
    return text[alike:]


def mask_output() -> None:
    """Mask secrets in everything that this process prints from now on.

    A second call has no effect.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, MaskedStream):
            continue
        masked = MaskedStream(stream)
        setattr(sys, name, masked)
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):  # handlers that keep the stream itself
            for handler in getattr(logger, "handlers", ()):
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    with suppress(AttributeError):  # the handler of last resort asks for `sys.stderr` each time
                        handler.stream = masked
