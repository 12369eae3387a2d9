"""The metric MIND: the sliced Wasserstein distance of features (Berthet et al., arXiv:2605.06797). Shapes: features (N, D)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cdm_lightning.core.rng import stream
from cdm_lightning.kinds import Count, FeatureName, Name, Seed
from cdm_lightning.metrics.against import AgainstReference, are_finite
from cdm_lightning.metrics.base import MeasuredImages

FEW = 1000  # images, the fewest that the paper calls informative


def mind(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Return MIND of `a` (N, D) and `b` (N, D), for `directions` (K, D) of length 1.

    It is 3 D times the mean, over the directions, of the squared Wasserstein distance of the features' projections. In
    one dimension, this distance is the mean squared difference of the sorted numbers. If the means differ by m and
    nothing else differs, MIND is about 3 |m|^2.
    """
    ordered = [(one @ directions.T).sort(dim=0).values for one in (a, b)]
    return 3 * a.shape[1] * float((ordered[0] - ordered[1]).square().mean())


class MIND(AgainstReference):
    """The distance `mind` of a sampler's images and a reference, for `projections` random directions.

    `seed` determines the directions. If the two sets have different numbers of images, images of the larger set are
    drawn, without replacement. The distance is called MIND with `InceptionFeatures`. It needs fewer images than a
    Fréchet distance, but it also depends on their number. The other arguments are those of `AgainstReference`.
    """

    def __init__(
        self,
        reference: Iterable[Tensor] | None = None,
        sampler: Name | None = None,
        feature: FeatureName = "inception",
        projections: Count = 1000,
        seed: Seed = 0,
    ) -> None:
        super().__init__(reference, sampler, feature)
        self.projections, self.seed = projections, seed

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return MIND, or None if there is no reference (see `AgainstReference.pair`)."""
        found = self.pair(measured, others)
        if found is None or not are_finite(*found):
            return None if found is None else float("nan")
        size = min(map(len, found))
        rng = stream(self.seed, "images of MIND")
        own, reference = (
            one if len(one) == size else one[torch.randperm(len(one), generator=rng)[:size]] for one in found
        )
        rng = stream(self.seed, "directions of MIND")
        directions = torch.randn(self.projections, own.shape[1], generator=rng, dtype=torch.float64)
        return mind(own, reference, torch.nn.functional.normalize(directions))

    def work(self, images: int, width: int) -> float:
        """Return about how many multiplications and additions `figures` takes (see `Metric.work`)."""
        return 2.0 * images * self.projections * (width + 50)  # sorting is like 50 multiplications

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has few images, otherwise None."""
        count = len(measured)
        if count >= FEW or self.too_few(count):
            return self.too_few(count)
        return (
            f"{count} images are fewer than the {FEW} that its paper calls enough; compare only figures for this number"
        )
