"""Share of the validation images that show all their prompts ask for."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from cdm_lightning.callbacks.image_score import ImageScore
from cdm_lightning.ladder import AdherenceJudge


class AdherenceCallback(ImageScore):
    """Logs `val/adherence/SAMPLER`, in [0, 1]; `judge` is a `metrics.shapes_classifier.ShapesClassifier` or so."""

    def __init__(self, judge: AdherenceJudge) -> None:
        super().__init__("adherence", judge)

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """1 where an image adheres, else 0: (B,)."""
        return cast(AdherenceJudge, self.model).adherence(images, prompts)
