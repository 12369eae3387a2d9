"""The progress of a long task on stderr: a bar on a terminal, or a line every ten seconds in a log file."""

import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

LINE_EVERY = 10.0  # seconds between two lines if stderr is not a terminal
REFRESH_EVERY = 0.5  # seconds between two updates of the figures on a bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed} elapsed, {remaining} left{postfix}]"
Figures = Callable[[], Mapping[str, str]]  # a function, because reading a loss waits for the GPU


class Progress:
    """A counter of steps from `initial` to `total`, shown on stderr with the elapsed and the remaining time.

    `description` is shown in front of the count. With `silent`, nothing is shown: if a task has several processes, all
    of them except the first should be silent.
    """

    def __init__(self, description: str, total: int, initial: int = 0, silent: bool = False) -> None:
        self.description, self.total, self.done, self.silent = description, total, initial, silent
        self._initial, self._start, self._shown = initial, time.perf_counter(), 0.0
        self._bar: tqdm | None = None
        if not silent and sys.stderr.isatty():
            self._bar = tqdm(desc=description, total=total, initial=initial, bar_format=BAR, dynamic_ncols=True)

    def describe(self, description: str) -> None:
        """Show `description` in front of the count from now on."""
        if description == self.description:
            return
        self.description = description
        if self._bar is not None:
            self._bar.set_description_str(description)
        elif not self.silent:
            self._write_line({})

    def advance(self, count: int = 1, figures: Figures = dict) -> None:
        """Count `count` more steps as done. The display is updated from time to time, and after the last step.

        `figures()` returns a dict {name: value as text} that is shown next to the count. A loss is an example of such a
        value. `figures` is called only when the display is updated, because reading a loss from a GPU interrupts the
        GPU's work.
        """
        self.done += count
        now = time.perf_counter()
        last = self.done >= self.total
        if self._bar is not None:
            self._bar.update(count)
            if last or now - self._shown >= REFRESH_EVERY:
                self._shown = now
                self._bar.set_postfix(figures())
        elif not self.silent and (last or now - self._shown >= LINE_EVERY):
            self._write_line(figures())

    def print(self, text: str) -> None:
        """Print `text` on stderr, above the bar if there is one. With `silent`, nothing is printed."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self.silent:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop updating the bar, and leave it visible."""
        if self._bar is not None:
            self._bar.close()

    def _write_line(self, figures: Mapping[str, str]) -> None:
        self._shown = time.perf_counter()
        gone = self._shown - self._start
        steps = self.done - self._initial
        left = f", {_clock(gone / steps * (self.total - self.done))} left" if steps else ""
        shown = "".join(f", {name} {value}" for name, value in figures.items())
        self.print(f"{self.description}: {self.done}/{self.total}{shown}, {_clock(gone)} elapsed{left}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
