"""The energy distance between the distributions of two sets of points.

This distance needs no kernel and no bandwidth.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cdm_lightning.kinds import FeatureName
from cdm_lightning.metrics.base import MeasuredImages, Metric


class EnergyDistance(Metric):
    """The `energy_distance` between the features of a sampler's images and the features of the true distribution.

    `exact` is a function that takes N prompts and returns the features (N, D) of samples of the true distribution for
    these prompts. `feature` is the name of the feature extractor for the sampler's images.
    """

    def __init__(self, exact: Callable[[Sequence[str]], Tensor], feature: FeatureName = "points") -> None:
        self.exact, self.feature, self.features = exact, feature, (feature,)

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return the energy distance for the images in `measured`, in the units of the features.

        Returns None for fewer than 2 images.
        """
        if len(measured) < 2:
            return None
        return float(energy_distance(measured.features[self.feature], self.exact(measured.prompts)))


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the energy distance 2 E|a - b| - E|a - a'| - E|b - b'| of points a (N, D) and b (M, D).

    In this formula, a' is another point of the set of a, and b' is another point of the set of b. The result is a 0-d
    float64 in the units of the points. The energy distance of equal distributions is 0 (Székely and Rizzo, 2013). The
    estimate from points is unbiased, because no point is paired with itself, so it can be slightly negative. Raises
    ValueError for fewer than 2 points in a set.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"energy distance needs at least 2 points in each set, got {len(a)} and {len(b)}")
    return 2 * _distances(a, b).mean() - _mean_within(a) - _mean_within(b)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the default for large sets uses a matrix product, which is inaccurate for small distances
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _mean_within(a: Tensor) -> Tensor:
    return _distances(a, a).sum() / (len(a) * (len(a) - 1))
