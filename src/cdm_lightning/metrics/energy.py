"""The energy distance between the distributions of two sets of points.

Unlike the maximum mean discrepancy, this distance needs no kernel and no bandwidth.
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

    least_images = 2  # for a distance within the set

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
    """Return an unbiased estimate of the energy distance between the distributions of points `a` (N, D) and `b` (M, D).

    The distance is 2 E|x - y| - E|x - x'| - E|y - y'|, where x and x' are different points of `a`, and y and y' are
    different points of `b`. It is 0 for equal distributions (Székely and Rizzo, 2013). The estimate can be slightly
    negative, because no point is paired with itself. It is a 0-d float64 in the units of the points. Raises ValueError
    for fewer than 2 points in a set.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"energy distance needs at least 2 points in each set, got {len(a)} and {len(b)}")
    return 2 * _distances(a, b).mean() - _mean_within(a) - _mean_within(b)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the default for large sets uses a matrix product, which is inaccurate for small distances
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _mean_within(a: Tensor) -> Tensor:
    return _distances(a, a).sum() / (len(a) * (len(a) - 1))
