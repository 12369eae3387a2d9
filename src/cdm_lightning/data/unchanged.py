"""Noticing that a file has changed since it was first read, for files that a run reads again and again."""

import os
from dataclasses import dataclass
from pathlib import Path

from cdm_lightning.errors import UserError


@dataclass(frozen=True)
class FileState:
    """The size of a file in bytes and the time of its last change in nanoseconds, to see later whether it has changed."""

    size: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> "FileState":
        """Return the current state of a file, given by path or by open descriptor; raise OSError if there is no such file."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns)

    def require(self, file: Path | int, path: Path) -> None:
        """Raise `UserError`, which names `path`, if `file` (a path or an open descriptor) no longer has this size and time."""
        try:
            same = FileState.of(file) == self
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{path}: the prompt file has changed since the run opened it, so the positions of its prompts are wrong; "
                "restore the file and run the same command again"
            )
