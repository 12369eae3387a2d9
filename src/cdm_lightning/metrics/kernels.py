"""Distances of two sets of features by a kernel (maximum mean discrepancy, MMD): KID and CMMD.

For a kernel k, MMD^2 is E k(x, x') + E k(y, y') - 2 E k(x, y), where x and x' are from one distribution and y and y' from
the other (Gretton et al., 2012). The estimate of KID has no bias, so its mean does not depend on the number of images.
Shapes: features (N, D).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cdm_lightning.core.rng import stream
from cdm_lightning.kinds import Count, FeatureName, Name, Positive, Seed, Several
from cdm_lightning.metrics.against import LARGEST_BLOCK, AgainstReference, are_finite
from cdm_lightning.metrics.base import MeasuredImages

FEW = 1000  # images


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """Return the kernel (x.y / D + 1)^3 of KID (Binkowski et al., arXiv:1801.01401) of `a` (N, D) and `b` (M, D): (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """Return the kernel exp(-|x - y|^2 / (2 sigma^2)) of `a` (N, D) and `b` (M, D), (N, M)."""
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return torch.exp(squares.clamp(min=0) / (-2 * sigma**2))


Kernel = Callable[[Tensor, Tensor], Tensor]


def mmd(kernel: Kernel, a: Tensor, b: Tensor, is_biased: bool = False, within_b: float | None = None) -> float:
    """Return the estimate of MMD^2 between `a` (N, D) and `b` (M, D).

    The estimate has no bias, because no point is paired with itself. With `is_biased`, points are paired with
    themselves too, so that the estimate is never negative. Without it, N and M must be at least 2. `within_b` is
    `mean_within` of `b`, if it is known.
    """
    within_b = mean_within(kernel, b, is_biased) if within_b is None else within_b
    return mean_within(kernel, a, is_biased) + within_b - 2 * _total(kernel, a, b) / (len(a) * len(b))


def mean_within(kernel: Kernel, a: Tensor, is_biased: bool) -> float:
    """Return the mean kernel of two points of `a` (N, D), which may be the same point only with `is_biased`."""
    return _total(kernel, a, a, is_biased) / (len(a) * (len(a) if is_biased else len(a) - 1))


def _total(kernel: Kernel, one: Tensor, other: Tensor, with_itself: bool = True) -> float:
    found, start = 0.0, 0
    for rows in one.split(max(1, LARGEST_BLOCK // len(other))):  # N x M numbers may be too many for the memory
        block = kernel(rows, other)
        found += float(block.sum() if with_itself else block.sum() - block.diagonal(start).sum())
        start += len(rows)
    return found


class KID(AgainstReference):
    """The kernel distance of a sampler's images and a reference (Binkowski et al., arXiv:1801.01401), as "mean" and "std".

    Its kernel is `polynomial`. As in torchmetrics and torch-fidelity, the mean is that of `subsets` subsets of
    `subset_size` images, drawn without replacement from both sets, and "std" is the standard deviation of the subsets'
    distances. `seed` determines the subsets, and no global random state is used. If a set has no more than
    `subset_size` images, the mean is the unbiased estimate from all images, and there is no "std". The distance is
    called KID with `InceptionFeatures`. The other arguments are those of `AgainstReference`.
    """

    figures_without_interval = ("std",)
    no_interval = "it describes the subsets"

    def __init__(
        self,
        reference: Iterable[Tensor] | None = None,
        sampler: Name | None = None,
        feature: FeatureName = "inception",
        subsets: Count = 100,
        subset_size: Several = 1000,
        seed: Seed = 0,
    ) -> None:
        super().__init__(reference, sampler, feature)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> dict[str, float] | None:
        """Return {"mean": ..., "std": ...}, or None if there is no reference (see `AgainstReference.pair`)."""
        from torchmetrics.image.kid import poly_mmd  # takes seconds to import, so only where it is used

        found = self.pair(measured, others)
        if found is None or not are_finite(*found):
            return None if found is None else {"mean": float("nan")}
        own, reference = found
        if min(len(own), len(reference)) <= self.subset_size:
            within = self.of_reference(reference, lambda known: mean_within(polynomial, known, is_biased=False))
            return {"mean": mmd(polynomial, own, reference, within_b=within)}
        rng, values = stream(self.seed, "subsets of KID"), []
        for _ in range(self.subsets):
            drawn = [one[torch.randperm(len(one), generator=rng)[: self.subset_size]] for one in (reference, own)]
            values.append(poly_mmd(drawn[0], drawn[1]))
        several = torch.stack(values)
        return {"mean": float(several.mean()), "std": float(several.std(correction=0))}

    def work(self, images: int, width: int) -> float:
        """Return about how many multiplications and additions `figures` takes (see `Metric.work`)."""
        if min(images, self.references or images) <= self.subset_size:
            return self.pairs(images) * width
        return 6.0 * self.subsets * self.subset_size**2 * width

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has no more images than a subset, otherwise None."""
        count = len(measured)
        if count > self.subset_size or self.too_few(count):
            return self.too_few(count)
        return f"{count} images are not more than the {self.subset_size} of a subset, so all are used at once, and there is no std"


class CMMD(AgainstReference):
    """1000 x the MMD^2 of CLIP embeddings, with a Gaussian kernel of `sigma` = 10 (Jayasumana et al., arXiv:2401.09603).

    The embeddings are scaled to length 1. The estimate is the biased one, as in the paper's code, and never negative.
    The paper uses the CLIP model ViT-L/14 at 336 pixels; figures by other models cannot be compared with the paper's.
    The other arguments are those of `AgainstReference`.
    """

    def __init__(
        self,
        reference: Iterable[Tensor] | None = None,
        sampler: Name | None = None,
        feature: FeatureName = "clip_336",
        sigma: Positive = 10.0,
    ) -> None:
        super().__init__(reference, sampler, feature)
        self.sigma = sigma

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return CMMD, or None if there is no reference (see `AgainstReference.pair`)."""
        found = self.pair(measured, others)
        if found is None or not are_finite(*found):
            return None if found is None else float("nan")
        own, reference = (normalize(one) for one in found)
        kernel = partial(gaussian, sigma=self.sigma)
        within = self.of_reference(reference, lambda known: mean_within(kernel, known, is_biased=True))
        return 1000 * mmd(kernel, own, reference, is_biased=True, within_b=within)

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has few images, otherwise None."""
        count = len(measured)
        if count >= FEW or self.too_few(count):
            return self.too_few(count)
        return f"{count} images are few, so the figure is larger than it would be with many; compare only figures for this number"

    def work(self, images: int, width: int) -> float:
        """Return about how many multiplications and additions `figures` takes (see `Metric.work`)."""
        return self.pairs(images) * (width + 20)  # an exponential is like 20 multiplications
