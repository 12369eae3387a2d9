"""Adherence: the share of images that show everything that their prompts ask for."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cdm_lightning.metrics.base import ImageBatch, Metric


class AdherenceJudge(Protocol):
    """Any object that judges whether an image shows what its prompt asks for, such as `ShapesClassifier`."""

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return (B,) bool for images (B, 3, H, W) in [0, 1]: whether each shows what its prompt asks for."""
        ...


class Adherence(Metric):
    """The share, in [0, 1], of images that show what their prompts ask for, according to `judge`."""

    def __init__(self, judge: AdherenceJudge) -> None:
        self.judge = judge

    def check_prompt(self, prompt: str) -> None:
        """Ask the judge, if it can be asked without an image."""
        check = getattr(self.judge, "check_prompt", None)
        if check is not None:
            check(prompt)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return scores (B,): 1 for an image that shows what its prompt asks for, else 0."""
        return self.judge.adherence(batch.images, batch.prompts).float()
