"""Check that a file has not changed since it was first read. This is for files that a run reads again and again."""

import os
from dataclasses import dataclass
from pathlib import Path

from cdm_lightning.errors import UserError


@dataclass(frozen=True)
class FileState:
    """The state of a file: its size in bytes and the time of its last change in nanoseconds. See `require`."""

    size: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> "FileState":
        """Return the current state of a file, given by its path or an open descriptor. Raises OSError if it does not exist."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns)

    def require(self, file: Path | int, path: Path) -> None:
        """Raise `UserError` if the current state of `file` differs from this state.

        `file` is a path or an open descriptor. The error message calls the file `path`.
        """
        try:
            same = FileState.of(file) == self
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{path}: the prompt file has changed while the run was using it; restore the file and run the same command again"
            )
