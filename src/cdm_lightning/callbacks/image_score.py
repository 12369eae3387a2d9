"""What the callbacks share that give every validation image a number and log the mean for each sampler."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


class ImageScore(L.Callback, ABC):
    """Logs `val/NAME/SAMPLER`, the mean of `measure` over the validation images of all processes."""

    def __init__(self, name: str, model: object) -> None:
        self.name, self.model = name, model
        self._sums: dict[str, Tensor] = {}  # sampler -> (sum of scores, number of images)

    @abstractmethod
    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Begin anew, with the model where the networks are."""
        self._sums = {}
        if isinstance(self.model, nn.Module):
            self.model.to(pl_module.device)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", outputs: dict, *_: object) -> None:
        """Add this batch's scores."""
        for sampler, images in outputs["images"].items():
            scores = self.measure(images, outputs["prompts"]).float().cpu()
            both = torch.stack([scores.sum(), torch.tensor(float(len(scores)))])
            self._sums[sampler] = self._sums.get(sampler, 0) + both

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Log the means."""
        if trainer.sanity_checking:
            return
        for sampler, sums in self._sums.items():
            total, count = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
            pl_module.log(f"val/{self.name}/{sampler}", total / count)
