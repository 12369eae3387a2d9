"""The metric diversity: the mean distance between images that are made for the same prompt from different noise."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import Count, FeatureName, Name, Several
from cdm_lightning.metrics.against import as_ratio
from cdm_lightning.metrics.base import Copies, MeasuredImages, Metric


class Diversity(Metric):
    """The mean distance between the features of images that are made for the same prompt from different noise.

    A small distance means that the noise hardly changes the images. The metric needs `images_per_prompt` images for
    each of the first `prompts` prompts. `feature` is the name of the feature extractor. With `sampler`, the name of
    another sampler such as the teacher, the figure is divided by that of this sampler, so 1 means equally diverse.
    Validation makes only one image per prompt, so validation does not report this metric.

    Raises `UserError` for `prompts` < 1 or `images_per_prompt` < 2.
    """

    def __init__(
        self,
        feature: FeatureName = "clip",
        prompts: Count = 32,
        images_per_prompt: Several = 4,
        sampler: Name | None = None,
    ) -> None:
        if prompts < 1 or images_per_prompt < 2:
            raise UserError(
                f"the metric Diversity: prompts={prompts} must be at least 1, and images_per_prompt={images_per_prompt} at least "
                "2; remove the metric to turn it off"
            )
        self.feature, self.features, self.sampler = feature, (feature,), sampler
        self.copies = Copies(prompts, images_per_prompt)

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return the `pairwise_diversity` of the features in `measured.copies`, or its ratio to that of `sampler`.

        Returns None if there is only one image per prompt, and if `sampler` is not in `others`.
        """
        return as_ratio(self, measured, others)

    def score_of(self, measured: MeasuredImages) -> float | None:
        """Return the `pairwise_diversity` of the features in `measured.copies`, or None if there is one image per prompt."""
        copies = measured.copies.get(self.feature)
        if copies is None:
            return None
        assert self.copies is not None
        return pairwise_diversity(copies[: self.copies.prompts, : self.copies.images])


def pairwise_diversity(features: Tensor) -> float:
    """Return the mean Euclidean distance between the features of two images of the same prompt.

    The mean is taken over all prompts and over all pairs of images of a prompt. `features` (P, M, D) holds the features
    of M images for each of P prompts. The distance is in the units of `features`. It is 0 if all images of a prompt are
    equal, that is, if they do not depend on the noise. Raises ValueError for M < 2.
    """
    images = features.shape[1]
    if images < 2:
        raise ValueError(f"diversity needs at least 2 images per prompt, got {images}")
    first, second = torch.triu_indices(images, images, offset=1)
    features = features.cpu().double()
    return float((features[:, first] - features[:, second]).norm(dim=-1).mean())
