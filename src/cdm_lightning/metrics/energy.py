"""Energy distance: a distance between the distributions of two sets of points, without a kernel or a bandwidth to choose."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cdm_lightning.kinds import FeatureName
from cdm_lightning.metrics.base import MeasuredImages, Metric


class EnergyDistance(Metric):
    """The `energy_distance` of the images' features to equally many samples that are drawn from the data distribution itself.

    `exact` returns the features (N, D) of such samples for N prompts; `feature` names the extractor of the images' features.
    """

    def __init__(self, exact: Callable[[Sequence[str]], Tensor], feature: FeatureName = "points") -> None:
        self.exact, self.feature, self.features = exact, feature, (feature,)

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return the distance, in the units of the features; None for fewer than 2 images."""
        if len(measured) < 2:
            return None
        return float(energy_distance(measured.features[self.feature], self.exact(measured.prompts)))


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 2 E|a - b| - E|a - a'| - E|b - b'| of points a (N, D) and b (M, D), as a 0-d float64 in their units.

    It is 0 for equal distributions (Székely and Rizzo, 2013). The estimate is unbiased (no point is paired with itself),
    so for equal distributions it may be slightly negative. Raises ValueError for a set of fewer than 2 points.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"energy distance needs at least 2 points in each set, got {len(a)} and {len(b)}")
    return 2 * _distances(a, b).mean() - _mean_within(a) - _mean_within(b)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the default for large sets uses a matrix product, which is inaccurate for small distances
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _mean_within(a: Tensor) -> Tensor:
    return _distances(a, a).sum() / (len(a) * (len(a) - 1))
