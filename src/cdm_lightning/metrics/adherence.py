"""The share of images that show all that their prompts ask for."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cdm_lightning.metrics.base import ImageBatch, Metric


class AdherenceJudge(Protocol):
    """Anything that says whether an image shows what its prompt asks for; `metrics.shapes_classifier` has one."""

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) bool for images (B, 3, H, W) in [0, 1]."""
        ...


class Adherence(Metric):
    """The share, in [0, 1], of images that `judge` finds to show what their prompts ask for."""

    def __init__(self, judge: AdherenceJudge) -> None:
        self.judge = judge

    def score(self, batch: ImageBatch) -> Tensor:
        """1 where an image adheres to its prompt, else 0: (B,)."""
        return self.judge.adherence(batch.images, batch.prompts).float()
