"""The base of metrics that compare two sets of features: those of a sampler's images, and those of a reference.

The reference is a set of images, or another sampler (a way to make images), such as the teacher in 50 steps. Shapes:
images (B, 3, H, W) in [0, 1], features (N, D).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.metrics.base import MeasuredImages, Metric, extract

Found = TypeVar("Found")
LARGEST_BLOCK = 1 << 24  # numbers in one block of a matrix of distances or kernels


class AgainstReference(Metric):
    """A metric of the images of a sampler against `reference` or against the images of another sampler.

    `reference` is an iterable of batches (B, 3, H, W) in [0, 1] of the reference images, which is iterated over once.
    `sampler` is the name of another sampler. One of the two must be None. `feature` is the name of the feature
    extractor. Raises `UserError` if both or none are given.
    """

    least_images = 2

    def __init__(self, reference: Iterable[Tensor] | None, sampler: str | None, feature: str) -> None:
        if (reference is None) == (sampler is None):
            raise UserError(
                f"the metric {type(self).__name__} compares with either reference images or another sampler; set reference or "
                "sampler, and set the other to null"
            )
        self.reference, self.sampler, self.feature, self.features = reference, sampler, feature, (feature,)
        self._known: Tensor | None = None
        self._kept: Any = None  # of the reference images, see `of_reference`

    def prepare(self, extractors: Mapping[str, nn.Module]) -> None:
        """Compute the features of the reference images, if there are any.

        `extractors` holds all feature extractors by name. Raises `UserError` for fewer than `least_images` reference
        images.
        """
        if self.reference is None or self._known is not None:
            return
        found = [extract(extractors[self.feature], images).cpu() for images in self.reference]
        count = sum(map(len, found))
        if count < self.least_images:
            raise UserError(
                f"the metric {type(self).__name__} needs at least {self.least_images} reference images, but there are {count}; "
                "set a reference with more images"
            )
        self._known = torch.cat(found)

    def pair(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> tuple[Tensor, Tensor] | None:
        """Return the features (N, D) of the images in `measured` and those (M, D) of the reference, as float64.

        `others` holds the measurements of all samplers by name. Returns None if `measured` are the reference's own
        images, if the reference sampler is not in `others`, or if either set has fewer than `least_images` images.
        """
        own = measured.features[self.feature]
        if self.sampler is None:
            reference = self._known
        else:
            other = others.get(self.sampler)
            reference = None if other is None or other is measured else other.features[self.feature]
        if reference is None or min(len(own), len(reference)) < self.least_images:
            return None
        return own.double(), reference.double()

    @property
    def references(self) -> int:
        """The number of reference images, or 0 if the reference is another sampler or has not been read."""
        return 0 if self._known is None else len(self._known)

    def of_reference(self, reference: Tensor, compute: Callable[[Tensor], Found]) -> Found:
        """Return `compute(reference)`. For reference images, it is computed once and kept for other samplers and resamples."""
        if self._known is None:
            return compute(reference)
        if self._kept is None:
            self._kept = compute(reference)
        return self._kept

    def pairs(self, images: int) -> float:
        """Return twice the number of pairs of images, of which one is a sampler's, that a figure of `images` images needs."""
        return 2.0 * (images * (images + self.references) if self._known is not None else 3 * images**2)

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has fewer than `least_images` images, otherwise None."""
        return self.too_few(len(measured))

    def too_few(self, images: int) -> str | None:
        """Return that there is no figure, because `images` is less than `least_images`, otherwise None."""
        if images >= self.least_images:
            return None
        return f"{images} images are too few, so there is no figure; use at least {self.least_images}"

    def facts(self) -> dict[str, float]:
        """Return the number of reference images as "reference_images", if the reference is a set of images."""
        return {"reference_images": self.references} if self.references else {}


def are_finite(*features: Tensor) -> bool:
    """Return whether all numbers are finite. They are not if the student has diverged."""
    return all(bool(torch.isfinite(one).all()) for one in features)


def distances(a: Tensor, b: Tensor) -> list[Tensor]:
    """Return the Euclidean distances between `a` (N, D) and `b` (M, D) as blocks of rows (R, M), which together have N rows.

    Each block is small enough for the memory, but all of them may not be: use them one by one.
    """
    rows = max(1, LARGEST_BLOCK // max(1, len(b)))
    centre = b.mean(0)  # small numbers, because the matrix product inside would lose the digits of large ones
    return [torch.cdist(block - centre, b - centre) for block in a.split(rows)]


class Scored(Protocol):
    """A metric whose figure is a number of one sampler alone, and may be divided by that of another sampler."""

    sampler: str | None

    def score_of(self, measured: MeasuredImages) -> float | None:
        """Return the number of the images in `measured`, or None if there is none."""
        ...


def as_ratio(metric: Scored, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
    """Return `metric.score_of(measured)`, divided by that of the sampler `metric.sampler` if it names one.

    `others` holds the measurements of all samplers by name. Returns None if the score is missing, or if that sampler is
    missing or its score is missing or 0.
    """
    score = metric.score_of(measured)
    if score is None or metric.sampler is None:
        return score
    other = others.get(metric.sampler)
    base = None if other is None else metric.score_of(other)
    return score / base if base else None
