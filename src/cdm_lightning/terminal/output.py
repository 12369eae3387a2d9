"""What a command prints, with secrets masked, whoever prints it: messages, tracebacks, warnings, and lines of libraries."""

import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from cdm_lightning.terminal.secrets import masked_text


class MaskedStream:
    """A text stream that writes to `stream` with secrets replaced by ***; all other attributes are those of `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text with secrets masked, and return its length, as any text stream does."""
        self.stream.write(masked_text(text) if isinstance(text, str) else text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __iter__(self) -> Any:
        return iter(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def mask_output() -> None:
    """Mask secrets in everything that this process prints from now on; calling it again changes nothing."""
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
