"""The network calls, floating-point operations and hours of a run. Plain arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

from cdm_lightning.objectives.base import RolloutKind

PEAK_TFLOPS = 989.0  # of an H100 or H200 in bfloat16 without sparsity, from NVIDIA's data sheet
UTILISATION = 0.4  # the assumed share of the peak that a run reaches


@dataclass(frozen=True)
class Work:
    """The work for one sample in an average iteration.

    `rollout_calls` are the student's calls in the rollout, `rollout` their floating-point operations, and `updates` the
    floating-point operations of each role's updates.
    """

    rollout_calls: float
    rollout: float
    updates: Mapping[str, float]

    @property
    def total(self) -> float:
        """The floating-point operations of one sample in an iteration."""
        return self.rollout + sum(self.updates.values())


def expected_calls(mean_length: float, rollout: RolloutKind) -> float:
    """Return the expected number of student calls in a rollout of K steps on average, including the call at the anchor.

    It is K for a full rollout, (K + 1) / 2 if it stops at the anchor, which is uniform on the K steps, and 0 without rollouts.
    """
    return {"full": mean_length, "to_anchor": (mean_length + 1) / 2, "none": 0.0}[rollout]


def hours(flops: float, batch: int, iterations: int, peak_tflops: float, utilisation: float) -> float:
    """Return the hours of a run in which each GPU does `flops` operations for each of `batch` samples in each iteration."""
    return iterations * batch * flops / (peak_tflops * 1e12 * utilisation) / 3600
