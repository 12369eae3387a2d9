"""The Vendi score: the effective number of different images in a set (Friedman and Dieng, arXiv:2210.02410).

The score is the exponential of the entropy of the eigenvalues of K / N, where K holds the cosine similarities of the
features of N images. It is 1 if all images are alike, and N if no two have anything in common. Shapes: features (N, D).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cdm_lightning.kinds import Count, FeatureName, Name, Several
from cdm_lightning.metrics.against import as_ratio
from cdm_lightning.metrics.base import Copies, MeasuredImages, Metric


def vendi_score(features: Tensor) -> float:
    """Return the Vendi score of `features` (N, D), in [1, min(N, D)]. It is NaN if a feature is not finite."""
    if not torch.isfinite(features).all():
        return float("nan")
    rows = torch.nn.functional.normalize(features.double()) / len(features) ** 0.5
    small = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows  # both have the same eigenvalues above 0
    values = torch.linalg.eigvalsh(small).clamp(min=0)
    return float(torch.exp(-torch.special.xlogy(values, values).sum()))


class Vendi(Metric):
    """The Vendi score of all images of a sampler (a way to make images).

    If `sampler`, the name of another sampler, is given, the figure is divided by the score of that sampler, so 1 means
    equally diverse. `feature` is the name of the feature extractor. There is no interval: resamples contain images
    several times and are therefore less diverse.
    """

    least_images = 2
    figures_without_interval = ("",)
    no_interval = "repeated images are less diverse"

    def __init__(self, feature: FeatureName = "clip", sampler: Name | None = None) -> None:
        self.feature, self.features, self.sampler = feature, (feature,), sampler

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return the score of the images in `measured`, or its ratio to that of `sampler`.

        Returns None for fewer than 2 images, and if `sampler` is not in `others`.
        """
        return as_ratio(self, measured, others)

    def score_of(self, measured: MeasuredImages) -> float | None:
        """Return the score of the images in `measured`, or None for fewer than 2 images."""
        return None if len(measured) < self.least_images else vendi_score(measured.features[self.feature])

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has fewer images than features, otherwise None."""
        count, width = measured.features[self.feature].shape
        return (
            None
            if count > width
            else f"{count} images are few for {width} features, so the score depends on their number"
        )


class VendiWithinPrompt(Metric):
    """The mean Vendi score of `images_per_prompt` images of a prompt, over the first `prompts` prompts.

    It lies between 1 (the noise changes nothing) and `images_per_prompt`. With `sampler`, the name of another sampler,
    it is divided by the figure of that sampler. `feature` is the name of the feature extractor. Validation makes only one image
    per prompt, so validation does not report this metric.
    """

    def __init__(
        self,
        feature: FeatureName = "clip",
        prompts: Count = 32,
        images_per_prompt: Several = 4,
        sampler: Name | None = None,
    ) -> None:
        self.feature, self.features, self.sampler = feature, (feature,), sampler
        self.prompts, self.images = prompts, images_per_prompt
        self.copies = Copies(prompts, images_per_prompt)

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return the mean score, or its ratio to that of `sampler`, or None if there is one image per prompt."""
        return as_ratio(self, measured, others)

    def score_of(self, measured: MeasuredImages) -> float | None:
        """Return the mean score of the images in `measured`, or None if there is one image per prompt."""
        copies = measured.copies.get(self.feature)
        if copies is None:
            return None
        scores = [vendi_score(images) for images in copies[: self.prompts, : self.images]]
        return sum(scores) / len(scores)

    def work(self, images: int, width: int) -> float:
        """Return about how many multiplications and additions `figures` takes (see `Metric.work`)."""
        return self.prompts * (2.0 * self.images**2 * width + 1e4)
