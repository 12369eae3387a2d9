"""The progress of a long task on stderr: a bar on a terminal, or a line every ten seconds in a log."""

import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

LINE_EVERY = 10.0  # seconds between two lines if stderr is not a terminal
REFRESH_EVERY = 0.5  # seconds between two updates of the figures on a bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed} elapsed, {remaining} left{postfix}]"
Figures = Callable[[], Mapping[str, str]]  # called only to show figures, because reading a loss waits for the device


class Progress:
    """A counter of steps from `initial` to `total`, shown on stderr with elapsed and remaining time.

    `silent` shows nothing; of several processes, all but the first pass it.
    """

    def __init__(self, description: str, total: int, initial: int = 0, silent: bool = False) -> None:
        self.description, self.total, self.done, self.silent = description, total, initial, silent
        self._initial, self._start, self._shown = initial, time.perf_counter(), 0.0
        self._bar: tqdm | None = None
        if not silent and sys.stderr.isatty():
            self._bar = tqdm(desc=description, total=total, initial=initial, bar_format=BAR, dynamic_ncols=True)

    def describe(self, description: str) -> None:
        """Change the text that says what is being done, and show it."""
        if description == self.description:
            return
        self.description = description
        if self._bar is not None:
            self._bar.set_description_str(description)
        elif not self.silent:
            self._write_line({})

    def advance(self, count: int = 1, figures: Figures = dict) -> None:
        """Count `count` more steps as done; now and then, and at the end, show the count and what `figures()` returns.

        `figures` returns {name: value as text}, such as a loss. It is called only when it is shown, because reading a loss makes
        the host wait for the device.
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
        """Print `text` as a line of its own on stderr, which the bar does not overwrite."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self.silent:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar, which stays visible in its current state."""
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
