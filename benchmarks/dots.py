"""Prompts of the plane with a picture each, for objectives that learn from real images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.core.rng import stream
from cdm_lightning.data.prompts import PromptFile, PromptList


class Dots(PromptFile):
    """The prompts of a file; the picture of each shows one point of its distribution, which depends on `seed` and its number."""

    has_images = True

    def __init__(self, path: str | Path, seed: int = 0) -> None:
        super().__init__(path)
        self.seed, self._plane = seed, Toy2DBackbone()

    def image(self, index: int) -> Tensor:
        """Return a dark square (3, 32, 32) with a bright dot."""
        with torch.device("cpu"):
            point = self._plane.exact_samples([self[index]], stream(self.seed, "dot", index).initial_seed())
            return self._plane.decode_latents(point)[0]


class PicturedPoints(PromptList):
    """The prompts of a list, each repetition with a picture of another point of its distribution."""

    has_images = True

    def __init__(self, prompts: Sequence[str], repeat: int = 1) -> None:
        super().__init__(prompts, repeat)
        self._plane = Toy2DBackbone()
        with torch.device("cpu"):
            self._points = self._plane.exact_samples([self[index] for index in range(len(self))], seed=0)

    def image(self, index: int) -> Tensor:
        """Return a dark square (3, 32, 32) with a bright dot."""
        return self._plane.decode_latents(self._points[index : index + 1])[0]
