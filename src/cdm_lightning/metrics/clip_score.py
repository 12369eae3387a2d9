"""The CLIP score of images and their prompts: 100 x the cosine similarity of their CLIP embeddings.

The score is that of arXiv:2104.08718, but negative similarities stay negative here, where the paper sets them to 0.
"""

import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.kinds import FeatureName
from cdm_lightning.metrics.base import ImageBatch, Metric


class CLIPScore(Metric):
    """A sampler's CLIP score: the mean, over its images, of the CLIP score of image and prompt, in [-100, 100].

    `feature` is the name of a feature extractor that can also encode prompts.
    """

    def __init__(self, feature: FeatureName = "clip") -> None:
        self.feature = feature
        self.features = self.text_features = (feature,)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return the CLIP score of each image in `batch` and its prompt: (B,)."""
        return 100 * F.cosine_similarity(batch.features(self.feature), batch.text_features(self.feature))
