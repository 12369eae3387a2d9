"""Precision, recall, density and coverage: how far two sets of features overlap, by their nearest neighbours.

A set of features is described by balls. Each feature is the centre of a ball that reaches to its `k`-th nearest neighbour in
the set. Shapes: features (N, D).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cdm_lightning.kinds import Count, FeatureName, Name
from cdm_lightning.metrics.against import AgainstReference, are_finite, distances
from cdm_lightning.metrics.base import MeasuredImages

FIGURES = ("precision", "recall", "density", "coverage")
FEW = 1000  # images; the papers use 10,000 to 50,000


def radii(features: Tensor, k: int) -> Tensor:
    """Return the distances (N,) of `features` (N, D) to their k-th nearest neighbours in this set, for N > k."""
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in distances(features, features)])  # 1: itself


def overlap(own: Tensor, reference: Tensor, k: int, reference_radii: Tensor | None = None) -> dict[str, float]:
    """Return the figures of a sampler's features `own` (N, D) against those of the `reference` (M, D), for N and M > k.

    - "precision" is the share of `own` inside a ball of the reference, and "recall" the share of the reference inside a
      ball of `own` (Kynkäänniemi et al., arXiv:1904.06991).
    - "density" is the mean number of balls of the reference around a feature of `own`, divided by k. "coverage" is the
      share of the balls of the reference that hold a feature of `own` (Naeem et al., arXiv:2002.09797).

    `reference_radii` are the `radii` of the reference, if they are known.
    """
    own_radii = radii(own, k)
    reference_radii = radii(reference, k) if reference_radii is None else reference_radii
    inside, recalled, covered = [], torch.zeros(len(reference)).bool(), torch.zeros(len(reference)).bool()
    start = 0
    for block in distances(own, reference):  # (R, M)
        within = block <= reference_radii
        inside.append(within.sum(1))
        covered |= within.any(0)
        recalled |= (block <= own_radii[start : start + len(block), None]).any(0)
        start += len(block)
    balls = torch.cat(inside).double()
    values = ((balls > 0).double(), recalled.double(), balls / k, covered.double())
    return {name: float(value.mean()) for name, value in zip(FIGURES, values, strict=True)}


class PrecisionRecall(AgainstReference):
    """The figures of `overlap` for a sampler's images and a reference, with the `k`-th nearest neighbours.

    Low precision means that images look unlike the reference, and low recall that some kinds of reference images are
    missing. The other arguments are those of `AgainstReference`. In a resample, images are repeated. Their nearest
    neighbours are then copies of themselves, so intervals of recall and coverage would be wrong. Precision and density have intervals
    if the reference is a set of images, because they are then means over the sampler's images.
    """

    no_interval = "repeated images have no distance to each other"

    def __init__(
        self,
        reference: Iterable[Tensor] | None = None,
        sampler: Name | None = None,
        feature: FeatureName = "inception",
        k: Count = 3,
    ) -> None:
        super().__init__(reference, sampler, feature)
        self.k, self.least_images = k, k + 2
        self.figures_without_interval = FIGURES if reference is None else ("recall", "coverage")

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> dict[str, float] | None:
        """Return the figures, or None if there is no reference (see `AgainstReference.pair`)."""
        found = self.pair(measured, others)
        if found is None or not are_finite(*found):
            return None if found is None else dict.fromkeys(FIGURES, float("nan"))
        return overlap(*found, self.k, self.of_reference(found[1], lambda known: radii(known, self.k)))

    def work(self, images: int, width: int) -> float:
        """Return about how many multiplications and additions `figures` takes (see `Metric.work`)."""
        return self.pairs(images) * (width + 30)  # the search of a radius is like 30

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has few images, otherwise None."""
        count = len(measured)
        if count >= FEW or self.too_few(count):
            return self.too_few(count)
        return f"{count} images are few, so the figures depend on their number; compare only figures for this number"
