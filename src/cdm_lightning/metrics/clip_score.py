"""How well images fit their prompts by CLIP: 100 x cosine similarity (arXiv:2104.08718, without its clamp at 0)."""

import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.metrics.base import ImageBatch, Metric


class CLIPScore(Metric):
    """The mean of 100 x the cosine of image and prompt, in [-100, 100]; `feature` names an extractor that also reads texts."""

    def __init__(self, feature: str = "clip") -> None:
        self.feature = feature
        self.features = (feature,)

    def score(self, batch: ImageBatch) -> Tensor:
        """Scores (B,) of images for their prompts."""
        return 100 * F.cosine_similarity(batch.features(self.feature), batch.text_features(self.feature))
