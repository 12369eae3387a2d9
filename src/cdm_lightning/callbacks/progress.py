"""The callback that shows the progress of a run: its phase, losses, samples per second and remaining time."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import lightning as L
from torch import Tensor

from cdm_lightning.terminal.progress import Progress

if TYPE_CHECKING:
    from cdm_lightning.data.batches import PromptBatch
    from cdm_lightning.module import CDMModule


class TrainingProgress(L.Callback):
    """Show the progress of training on stderr.

    A terminal shows a progress bar. If stderr is not a terminal, a line is printed every ten seconds. In both cases,
    the figures of each validation are printed on a separate line.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._began, self._samples = 0.0, 0
        self._losses: dict[str, str] = {}  # as they were logged last

    def setup(self, trainer: L.Trainer, pl_module: "CDMModule", stage: str) -> None:
        """Print that networks are being loaded, because it can take minutes to load pretrained weights."""
        if trainer.is_global_zero:
            print("loading the networks", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Start the progress bar, and start to measure the training speed in samples per second."""
        self._progress = Progress("training", trainer.max_steps, trainer.global_step, silent=not trainer.is_global_zero)
        self._began, self._samples = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "CDMModule", outputs: object, batch: "PromptBatch", *_: object
    ) -> None:
        """Advance the progress bar by one iteration, and count the prompts of `batch` for the training speed.

        The losses in the bar change only every `trainer.log_every_n_steps` iterations, because reading them waits for
        the device.
        """
        self._samples += len(batch.prompts) * trainer.world_size
        # pyrefly: ignore[missing-attribute]  Lightning sets this attribute from another module
        if pl_module.iteration % trainer.log_every_n_steps == 0:  # reading a figure waits for the device
            self._losses = _losses(trainer.callback_metrics)
        cast(Progress, self._progress).advance(1, self._figures)

    def on_validation_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Show that validation runs. Stop the timer of the training speed, so that validation time is not counted."""
        if self._progress is not None:
            self._progress.describe("validating")
            self._began -= time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Print the figures of this validation, and let the timer of the training speed run on."""
        if self._progress is not None:
            shown = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            figures = ", ".join(f"{name.removeprefix('val/')} {float(value):.4g}" for name, value in shown.items())
            self._progress.print(f"iteration {pl_module.iteration}: {figures or 'images generated'}")
            self._progress.describe("training")
            self._began += time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Close the progress bar. It stays visible."""
        cast(Progress, self._progress).close()

    def on_exception(self, trainer: L.Trainer, pl_module: "CDMModule", exception: BaseException) -> None:
        """Close the progress bar, so that the error message is printed below it."""
        if self._progress is not None:
            self._progress.close()

    def _figures(self) -> Mapping[str, str]:
        return {**self._losses, "samples/s": f"{self._samples / (time.perf_counter() - self._began):.1f}"}


def _losses(metrics: Mapping[str, Tensor]) -> dict[str, str]:
    losses = {name: value for name, value in metrics.items() if name.endswith("/loss")}
    return {name.removesuffix("/loss") + " loss": f"{float(value):.4f}" for name, value in losses.items()}
