"""Diversity within a prompt: the distance between images of the same prompt that started from different noise."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cdm_lightning.errors import UserError
from cdm_lightning.metrics.base import Copies, MeasuredImages, Metric


class Diversity(Metric):
    """`pairwise_diversity` of `images_per_prompt` images for each of the first `prompts` prompts.

    `feature` names the extractor. An evaluation with one image per prompt, such as validation, gives no figure.
    """

    def __init__(self, feature: str = "clip", prompts: int = 32, images_per_prompt: int = 4) -> None:
        if prompts < 1 or images_per_prompt < 2:
            raise UserError(
                "diversity needs prompts >= 1 and images_per_prompt >= 2, "
                f"got {prompts} and {images_per_prompt}; leave the metric out to turn it off"
            )
        self.feature, self.features = feature, (feature,)
        self.copies = Copies(prompts, images_per_prompt)

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return the mean distance within a prompt, in the units of the features; None without several images per prompt."""
        copies = measured.copies.get(self.feature)
        if copies is None:
            return None
        assert self.copies is not None
        return pairwise_diversity(copies[: self.copies.prompts, : self.copies.images])


def pairwise_diversity(features: Tensor) -> float:
    """Return the mean Euclidean distance over all pairs of images of a prompt, and over prompts.

    It is in the units of the features. features (P, M, D): P prompts with M >= 2 images each; ValueError for M < 2. A
    value of 0 means that the images do not depend on the noise.
    """
    images = features.shape[1]
    if images < 2:
        raise ValueError(f"diversity needs at least 2 images per prompt, got {images}")
    first, second = torch.triu_indices(images, images, offset=1)
    features = features.cpu().double()
    return float((features[:, first] - features[:, second]).norm(dim=-1).mean())
