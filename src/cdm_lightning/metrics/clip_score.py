"""The CLIP score of images and their prompts: 100 x the cosine similarity of their CLIP embeddings.

The score is that of arXiv:2104.08718, with one difference. The paper sets negative similarities to 0, but here they
stay negative.
"""

import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.kinds import FeatureName
from cdm_lightning.metrics.base import ImageBatch, Metric


class CLIPScore(Metric):
    """The mean CLIP score of a sampler's images and their prompts, in [-100, 100].

    `feature` is the name of a feature extractor that can also encode prompts.
    """

    def __init__(self, feature: FeatureName = "clip") -> None:
        self.feature = feature
        self.features = self.text_features = (feature,)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return the CLIP scores (B,) of the images in `batch` and their prompts."""
        return 100 * F.cosine_similarity(batch.features(self.feature), batch.text_features(self.feature))
