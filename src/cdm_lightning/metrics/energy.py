"""Energy distance between two sets of points: a distance of distributions that needs no features and no bandwidth."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cdm_lightning.metrics.base import MeasuredImages, Metric


class EnergyDistance(Metric):
    """`energy_distance` of the images' features to as many samples of the data, for data that can be sampled exactly.

    `exact` gives the features (N, D) of exact samples for N prompts; `feature` names the extractor of the images' features.
    """

    def __init__(self, exact: Callable[[Sequence[str]], Tensor], feature: str = "points") -> None:
        self.exact, self.feature, self.features = exact, feature, (feature,)

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """The distance, in the unit of length of the features; None for fewer than 2 images."""
        if len(measured) < 2:
            return None
        return float(energy_distance(measured.features[self.feature], self.exact(measured.prompts)))


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 E|a - b| - E|a - a'| - E|b - b'| of samples (N, D) and (M, D), N, M >= 2, in their unit of length: 0-d float64.

    0 for equal distributions (Székely and Rizzo, 2013). The estimate is unbiased (no point is paired with itself), so
    for equal distributions it lies around 0 and may be slightly negative. ValueError for a set of fewer than 2 points.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"energy distance needs 2 points or more in each set, got {len(a)} and {len(b)}")
    return 2 * _distances(a, b).mean() - _mean_within(a) - _mean_within(b)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the default of large sets goes by a matrix product and loses the small distances
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _mean_within(a: Tensor) -> Tensor:
    return _distances(a, a).sum() / (len(a) * (len(a) - 1))
