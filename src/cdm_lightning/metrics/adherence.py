"""The metric adherence: the share of images that show everything in their prompts."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cdm_lightning.metrics.base import ImageBatch, Metric


class AdherenceJudge(Protocol):
    """An object that decides whether an image shows everything in its prompt, such as the `ShapesClassifier`."""

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return (B,) bool: whether each of the images (B, 3, H, W) in [0, 1] shows everything in its prompt."""
        ...


class Adherence(Metric):
    """The share, in [0, 1], of images that show everything in their prompts. `judge` decides this for each image."""

    def __init__(self, judge: AdherenceJudge) -> None:
        self.judge = judge

    def check_prompt(self, prompt: str) -> None:
        """Call `judge.check_prompt`, which raises ValueError if images of this prompt cannot be judged.

        A judge without the method `check_prompt` accepts every prompt.
        """
        check = getattr(self.judge, "check_prompt", None)
        if check is not None:
            check(prompt)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return scores (B,): 1 for an image that shows everything in its prompt, and 0 otherwise."""
        return self.judge.adherence(batch.images, batch.prompts).float()
