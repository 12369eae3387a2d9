"""Network calls, floating-point operations and hours of a run. Plain arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

from cdm_lightning.objectives.base import RolloutKind

PEAK_TFLOPS = 989.0  # of an H100 or H200 in bfloat16 without sparsity, by NVIDIA's data sheet
UTILISATION = 0.4  # share of it that is reached; an assumption


@dataclass(frozen=True)
class Work:
    """What one sample costs in an average iteration: student's calls of a rollout, operations of it and of each role's updates."""

    rollout_calls: float
    rollout: float
    updates: Mapping[str, float]

    @property
    def total(self) -> float:
        """Floating-point operations of a sample in an iteration."""
        return self.rollout + sum(self.updates.values())


def expected_calls(mean_length: float, rollout: RolloutKind) -> float:
    """Student's calls of a rollout of K steps on average, its point included.

    K for a full one, (K + 1) / 2 where it stops at an anchor, which is uniform on the K steps, none without rollouts.
    """
    return {"full": mean_length, "to_anchor": (mean_length + 1) / 2, "none": 0.0}[rollout]


def hours(flops: float, batch: int, iterations: int, peak_tflops: float, utilisation: float) -> float:
    """Hours of a run in which each GPU does `flops` for each of `batch` samples in each iteration."""
    return iterations * batch * flops / (peak_tflops * 1e12 * utilisation) / 3600
