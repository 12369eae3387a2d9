"""A bad input as a case: the command, what it finds on the disk, and what it must do."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Expected = Literal["refused", "runs", "either"]
Prepare = Callable[[Path, Path], None]  # of the folder that the command runs in, and of the stock


@dataclass(frozen=True)
class Case:
    """One command line in a folder of its own (`work`), which `prepare(work, stock)` fills before.

    `expects` is "refused" (one line, exit status 2, before training), "runs" (exit status 0), or "either". Whatever it is,
    a traceback, a hang, foreign code, a changed file of somebody else, a secret in clear or a file outside is a fault.
    """

    kind: str
    name: str
    command: str
    arguments: Sequence[str]
    expects: Expected = "either"
    prepare: Prepare | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    keeps: Sequence[str] = ()  # paths in `work` that must be what they were, for example a FIFO
    into_home: bool = False  # the command is told to write into the home folder
    fresh: bool = False  # a new interpreter, since what is tried is set when one starts
    seconds: float = 180.0  # until it counts as a hang, even on a busy machine

    @property
    def key(self) -> str:
        """The name of the case among all."""
        return f"{self.kind}: {self.name}"

    @property
    def line(self) -> str:
        """The command line, to be run in the prepared folder."""
        variables = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        return f"{variables}python -m cdm_lightning.{self.command} {shlex.join(map(printable, self.arguments))}"


def printable(text: str) -> str:
    """The text without what a terminal or a file cannot show; long ones are cut."""
    shown = text.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= 300 else f"{shown[:120]}...({len(text)} characters)"
