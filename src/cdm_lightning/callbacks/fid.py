"""Fréchet distance of the validation images to real ones."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import lightning as L
from torch import Tensor, nn

from cdm_lightning.metrics.frechet import FeatureStatistics, FrechetDistance, extract

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


class FIDCallback(L.Callback):
    """Logs `val/NAME/SAMPLER`, the distance in the features of `extractor` to the images of `reference`.

    `reference` gives batches (B, 3, H, W) in [0, 1] and is read once, at the first validation, or it holds the
    statistics of their features. Call it `fid` only with the stock Inception. The extractor is in no checkpoint.
    """

    def __init__(
        self, extractor: nn.Module, reference: Iterable[Tensor] | FeatureStatistics, name: str = "frechet"
    ) -> None:
        self.extractor, self.reference, self.name = extractor, reference, name
        self._distances: dict[str, FrechetDistance] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Begin anew; go through the reference at the first time."""
        self._distances = {}
        self.extractor.to(pl_module.device)
        if not isinstance(self.reference, FeatureStatistics):
            self.reference = FeatureStatistics.of_images(self.extractor, self.reference)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", outputs: dict, *_: object) -> None:
        """Add this batch's features."""
        device = pl_module.device if trainer.world_size > 1 else "cpu"  # sums are float64, which not all devices have
        for sampler, images in outputs["images"].items():
            if sampler not in self._distances:
                self._distances[sampler] = FrechetDistance(cast(FeatureStatistics, self.reference), device)
            self._distances[sampler].update(extract(self.extractor, images))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Log the distances."""
        if trainer.sanity_checking:
            return
        for sampler, distance in self._distances.items():
            pl_module.log(f"val/{self.name}/{sampler}", distance.compute())
