"""What a command has measured so far: tables that are written whole after every figure, within a limit of time."""

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import evidence
from benchmarks.machine import markdown

LEFT_OUT = "Not measured"  # the table of what failed, or had no time


class Record:
    """The tables of one command, in files of its `name` in `folder`: NAME.json and NAME.md, written again after every figure.

    `facts` are those of `benchmarks.machine.facts`. A measurement that fails (for memory, say) leaves a row that says so, and
    the next one runs. A measurement for which fewer than the needed seconds of `minutes` are left is left out, in a row too.
    """

    def __init__(self, name: str, facts: Mapping[str, str], folder: Path, minutes: float) -> None:
        self.name, self.facts, self.folder = name, dict(facts), folder
        self.began = time.monotonic()
        self.end = self.began + 60 * minutes
        self.tables: dict[str, dict[str, dict[str, Any]]] = {}
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.end - time.monotonic()

    def put(self, table: str, key: str, /, **figures: Any) -> None:
        """Add figures to the row `key` of a table, or change them; then write everything."""
        row = self.tables.setdefault(table, {}).setdefault(key, {})
        row |= figures
        shown = ", ".join(f"{name} {shortened(value)}" for name, value in figures.items())
        print(f"[{time.monotonic() - self.began:5.0f} s] {table}: {key}: {shown}", flush=True)
        self._write()

    def text(self, ending: str, content: str) -> None:
        """Write a file of its own, NAME_ENDING.txt."""
        evidence.put(self.folder, {f"{self.name}_{ending}.txt": content})

    def attempt(self, what: str, work: Callable[[], Any], seconds: float = 0.0) -> bool:
        """Run `work` if `seconds` are left; whether it came to its end. What did not leaves a row in the table `LEFT_OUT`."""
        if self.left < max(seconds, 1.0):
            self.put(LEFT_OUT, what, reason=f"{max(self.left, 0):.0f} s left, about {seconds:.0f} s needed")
            return False
        with self._told(what) as outcome:
            work()
            outcome["done"] = True
        if not outcome:
            gc.collect()  # an error holds the tensors of the frames that it came from
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return bool(outcome)

    @contextmanager
    def _told(self, what: str) -> Iterator[dict[str, bool]]:
        try:
            yield (outcome := {})
        except Exception as error:
            outcome.clear()
            lines = str(error).strip().splitlines() or ["nothing said"]
            self.put(LEFT_OUT, what, reason=f"{type(error).__name__}: {lines[0]}")

    def _write(self) -> None:
        lines = [f"# {self.name}", "", *(f"- {key}: {value}" for key, value in self.facts.items())]
        for table, rows in self.tables.items():
            names = list(dict.fromkeys(name for row in rows.values() for name in row))
            cells = [{"": key, **{name: shortened(row.get(name, "")) for name in names}} for key, row in rows.items()]
            lines += ["", f"## {table}", "", markdown(cells)]
        found = {"facts": self.facts, "tables": self.tables}
        texts = {"json": json.dumps(found, indent=2) + "\n", "md": "\n".join(lines) + "\n"}
        evidence.put(self.folder, {f"{self.name}.{ending}": text for ending, text in texts.items()})


def shortened(value: Any) -> str:
    """A figure as tables show it: three digits, no bars."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).replace("|", "/").replace("\n", " ")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
