"""The network calls, floating-point operations and hours of a run, by plain arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

from cdm_lightning.objectives.base import RolloutKind

PEAK_TFLOPS = 989.0  # of an H100 or H200 in bfloat16 without sparsity, from NVIDIA's data sheet
UTILISATION = 0.4  # the assumed share of the peak that a run reaches


@dataclass(frozen=True)
class Work:
    """The work for one sample in an average iteration.

    `rollout_calls` is the expected number of the student's calls in the rollout, `rollout` their floating-point operations,
    and `updates` the floating-point operations of each trained role's updates (forward and backward passes).
    """

    rollout_calls: float
    rollout: float
    updates: Mapping[str, float]

    @property
    def total(self) -> float:
        """The floating-point operations of one sample in an iteration."""
        return self.rollout + sum(self.updates.values())


def expected_calls(mean_length: float, rollout: RolloutKind) -> float:
    """Return the expected number of student calls in a rollout whose number of steps K has the mean `mean_length`.

    It is K for a "full" rollout, 0 for "none", and (K + 1) / 2 for one that stops "to_anchor": the anchor is uniform on the
    K steps, and the call at the anchor itself counts.
    """
    return {"full": mean_length, "to_anchor": (mean_length + 1) / 2, "none": 0.0}[rollout]


def hours(flops: float, batch: int, iterations: int, peak_tflops: float, utilisation: float) -> float:
    """Return the hours of a run in which each GPU does `flops` operations for each of `batch` samples in each iteration.

    A GPU does the share `utilisation` of `peak_tflops` 10^12 floating-point operations per second.
    """
    return iterations * batch * flops / (peak_tflops * 1e12 * utilisation) / 3600
