"""Loggers that may fail without ending a run, and a CSV log that a full disk cannot damage."""

import csv
import io
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch.loggers as library
import numpy as np
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from cdm_lightning.ends.optional import may_fail
from cdm_lightning.files import append_text, disk_error, write_text

if TYPE_CHECKING:
    from PIL.Image import Image


class GuardedLogger(library.Logger):
    """Wrap a logger, and turn its errors into one warning, so that they do not end the run.

    Logging resumes when the wrapped logger works again.

    Lightning sets up the wrapped logger before training. During this setup, only disk errors become warnings. Any other
    error of the setup, such as a missing login, ends the run.
    """

    def __init__(self, logger: library.Logger) -> None:
        super().__init__()
        self.inner = logger
        self._title = f"the log of {type(logger).__name__}"
        if isinstance(logger, library.TensorBoardLogger):
            _hide_thread_errors()

    @property
    def name(self) -> str | None:
        """The name that the wrapped logger gives to its log, or None."""
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        """The number or name by which the wrapped logger distinguishes this run's log from other logs, or None."""
        return self.inner.version

    @property
    def root_dir(self) -> str | None:
        """The folder in which the wrapped logger has a folder for each version, or None if there is no such folder."""
        return self.inner.root_dir

    @property
    def log_dir(self) -> str | None:
        """The folder into which the wrapped logger writes this version's files, or None if there is no such folder."""
        return self.inner.log_dir

    @property
    def save_dir(self) -> str | None:
        """The folder below which the wrapped logger writes all its files, or None if there is no such folder."""
        return self.inner.save_dir

    @property
    def experiment(self) -> Any:
        """The object through which the wrapped logger writes, for example the `SummaryWriter` of TensorBoard.

        Lightning reads this property before training, so mistakes in the logger's options are reported before training.
        """
        with may_fail(self._title, proves=False):
            return getattr(self.inner, "experiment", None)
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log the values in `metrics` at `step`."""
        self._call("log_metrics", metrics=metrics, step=step)

    def log_hyperparams(self, params: Any, *values: Any, **options: Any) -> None:
        """Log the hyperparameters `params`."""
        self._call("log_hyperparams", params, *values, **options)

    def log_picture(self, name: str, picture: "Image", step: int) -> None:
        """Log `picture` under `name` at `step`, if the wrapped logger supports pictures."""
        if isinstance(self.inner, library.TensorBoardLogger):
            with may_fail(self._title, Exception, proves=False):
                self.inner.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif hasattr(self.inner, "log_image"):  # Weights & Biases and loggers with the same method
            self._call("log_image", name, [picture], step=step)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Call `after_save_checkpoint` of the wrapped logger. Some loggers then upload the saved checkpoint."""
        self._call("after_save_checkpoint", checkpoint_callback)

    def save(self) -> None:
        """Write the logged metrics to the disk."""
        self._call("save", proves=True)

    def finalize(self, status: str) -> None:
        """Write the logged metrics and close the files. `status` says how the run ended, such as "success"."""
        self._call("finalize", status)

    def _call(self, method: str, *values: Any, proves: bool = False, **options: Any) -> None:
        with may_fail(self._title, Exception, proves=proves):
            try:
                getattr(self.inner, method)(*values, **options)
            except Exception:
                if isinstance(self.inner, library.TensorBoardLogger):
                    self.inner._experiment = None  # its thread has ended, and the next figures begin a new file
                raise


class CSVLogger(library.CSVLogger):
    """Lightning's CSV logger with a file that stays complete, even if a full disk or a crash interrupts a write."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The object that writes the rows of the CSV file."""
        if self._experiment is None:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = WholeRows(log_dir=self.log_dir)
        return self._experiment


class WholeRows(ExperimentWriter):
    """A writer of the rows of a CSV file. If the disk fails, the rows are kept and written with the next rows."""

    def save(self) -> None:
        """Write all rows that have not been written yet. Raises OSError and keeps the rows if the disk fails."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        keys = sorted(set(self.metrics_keys).union(*self.metrics))
        if keys == self.metrics_keys and path.exists():
            append_text(path, csv_rows(self.metrics, keys))
        else:  # there is a new column, so the whole file is written again
            old = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.exists() else []
            write_text(path, csv_rows([*old, *self.metrics], keys, header=True))
            self.metrics_keys = keys
        self.metrics = []


def csv_rows(rows: list[dict[str, Any]], keys: list[str], header: bool = False) -> str:
    """Return `rows` as lines of a CSV file with the columns `keys`.

    If `header` is True, a line with the names of the columns comes first.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _hide_thread_errors() -> None:
    """Hide tracebacks of disk errors in writer threads. The main thread gets the same error and prints a warning."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is None or disk_error(arguments.exc_value) is None:
            before(arguments)

    threading.excepthook = hook
