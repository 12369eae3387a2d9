"""Estimates of a run's work: how often it calls each neural network, its floating-point operations, and its hours."""

from collections.abc import Mapping
from dataclasses import dataclass

from cdm_lightning.objectives.base import RolloutKind

PEAK_TFLOPS = 989.0  # H100 or H200 in bfloat16 without sparsity, from NVIDIA's data sheet
UTILISATION = 0.4  # the assumed share of the peak that a run reaches


@dataclass(frozen=True)
class Work:
    """The work for one sample in an average iteration.

    `rollout_calls` is the expected number of student calls in the rollout, and `rollout` is the number of
    floating-point operations of these calls. `updates` maps each role to the number of floating-point operations of
    this network's updates (forward and backward passes).
    """

    rollout_calls: float
    rollout: float
    updates: Mapping[str, float]

    @property
    def total(self) -> float:
        """The floating-point operations for one sample in an average iteration, in its rollout and all updates."""
        return self.rollout + sum(self.updates.values())


def expected_calls(mean_length: float, rollout: RolloutKind) -> float:
    """Return the expected number of student calls in a rollout, for a mean number of steps `mean_length`.

    `rollout` is "full", "to_anchor" or "none". A full rollout of K steps makes K calls. With "to_anchor", the rollout
    stops at the anchor, a step that is drawn uniformly from 1 to K. It then makes one call for each step up to and
    including the anchor, which is (K + 1) / 2 calls on average. With "none", there is no rollout and no call.
    """
    return {"full": mean_length, "to_anchor": (mean_length + 1) / 2, "none": 0.0}[rollout]


def hours(flops: float, batch: int, iterations: int, peak_tflops: float, utilisation: float) -> float:
    """Return the hours of a run in which each GPU does `flops` operations for each of `batch` samples in each iteration.

    A GPU does `utilisation * peak_tflops * 1e12` floating-point operations per second.
    """
    return iterations * batch * flops / (peak_tflops * 1e12 * utilisation) / 3600
