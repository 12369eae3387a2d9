"""The masking of secrets in everything that a process prints: messages, tracebacks, warnings, and lines of libraries."""

import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from cdm_lightning.terminal.secrets import masked_text


class MaskedStream:
    """A text stream that replaces secrets by *** before it writes to `stream`.

    All other attributes are those of `stream`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write `text` with its secrets masked, and return the length of `text`."""
        self.stream.write(masked_text(text) if isinstance(text, str) else text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts with their secrets masked."""
        for line in lines:
            self.write(line)

    def __iter__(self) -> Any:
        return iter(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def mask_output() -> None:
    """Mask secrets in everything that this process prints from now on.

    A second call changes nothing.
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
