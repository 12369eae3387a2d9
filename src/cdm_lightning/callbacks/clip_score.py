"""CLIP score of the validation images."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from cdm_lightning.callbacks.image_score import ImageScore
from cdm_lightning.ladder import ImageTextScorer


class CLIPScoreCallback(ImageScore):
    """Logs `val/clip_score/SAMPLER`; `scorer` is a `metrics.clip_score.CLIPScorer` or anything that scores."""

    def __init__(self, scorer: ImageTextScorer) -> None:
        super().__init__("clip_score", scorer)

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 x cosine similarity, (B,)."""
        return cast(ImageTextScorer, self.model).score(images, prompts)
