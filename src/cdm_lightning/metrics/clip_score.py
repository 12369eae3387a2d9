"""The CLIP score of images and their prompts: 100 x cosine similarity (arXiv:2104.08718, without its clamp at 0)."""

import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.kinds import FeatureName
from cdm_lightning.metrics.base import ImageBatch, Metric


class CLIPScore(Metric):
    """The CLIP score: the mean of 100 x the cosine similarity of image and prompt, in [-100, 100].

    `feature` is the name of a feature extractor that can also encode prompts.
    """

    def __init__(self, feature: FeatureName = "clip") -> None:
        self.feature = feature
        self.features = self.text_features = (feature,)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return the CLIP scores (B,) of a batch of images."""
        return 100 * F.cosine_similarity(batch.features(self.feature), batch.text_features(self.feature))
