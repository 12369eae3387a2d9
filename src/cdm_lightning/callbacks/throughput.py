"""The callback that logs the speed of a run, the time of each phase of an iteration, and the peak memory."""

import resource
import sys
import time
from typing import TYPE_CHECKING

import lightning as L
import torch

if TYPE_CHECKING:
    from cdm_lightning.data.batches import PromptBatch
    from cdm_lightning.module import CDMModule


class ThroughputMonitor(L.Callback):
    """Log these figures as `throughput/NAME` every `trainer.log_every_n_steps` iterations:

    - samples_per_second: training prompts per second of all processes together. The time of validation is not counted.
    - rollout_seconds: seconds per iteration for the student's rollouts.
    - NETWORK_seconds, such as student_seconds: seconds per iteration for the updates of a network. Iterations without
      an update of the network are counted with 0 seconds.
    - peak_memory_gib: the peak memory so far, in GiB. It is the memory of the GPU, or of this process if the run uses
      no GPU.

    Each figure except peak_memory_gib is a mean over the iterations since the figures were last logged. On a GPU, CUDA
    events measure rollout_seconds and NETWORK_seconds. The events are read only when the figures are logged, because
    reading them waits for the GPU.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._samples = self._iterations = 0
        self._phases: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Start to measure time and memory."""
        pl_module.timer.device = pl_module.device
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start_window(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Stop the timer of the training speed, so that the time of validation is not counted."""
        self._began -= time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Let the timer of the training speed run on after validation."""
        self._began += time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "CDMModule", outputs: object, batch: "PromptBatch", *_: object
    ) -> None:
        """Count the prompts of this batch.

        Every `trainer.log_every_n_steps` iterations, log the figures and begin new means, which cover only later
        iterations.
        """
        self._samples += len(batch.prompts) * trainer.world_size
        self._iterations += 1
        # pyrefly: ignore[missing-attribute]  Lightning sets this attribute from another module
        if pl_module.iteration % trainer.log_every_n_steps:
            return
        phases = pl_module.timer.seconds  # waits for the device, so that all iterations that are counted are finished
        seconds = time.perf_counter() - self._began
        figures = {"samples_per_second": self._samples / seconds, "peak_memory_gib": peak_memory_gib(pl_module.device)}
        for phase, total in phases.items():
            figures[f"{phase}_seconds"] = (total - self._phases.get(phase, 0.0)) / self._iterations
        pl_module.log_dict({f"throughput/{name}": value for name, value in figures.items()})
        self._start_window(pl_module)

    def _start_window(self, pl_module: "CDMModule") -> None:
        self._began, self._samples, self._iterations = time.perf_counter(), 0, 0
        self._phases = dict(pl_module.timer.seconds)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated memory of a CUDA device, or resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
