"""Distance of the validation samples to a data distribution that is known exactly."""

from typing import TYPE_CHECKING, cast

import lightning as L
import torch
from torch import Tensor

from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.metrics.energy import energy_distance
from cdm_lightning.ranks import gather

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


class EnergyDistance(L.Callback):
    """Logs `val/energy_distance/SAMPLER` between the points that the pictures show and as many exact samples (`seed`).

    For a backbone that can draw its data: `Toy2DBackbone`.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._prompts: list[str] = []
        self._points: dict[str, list[Tensor]] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Begin anew."""
        self._prompts, self._points = [], {}

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", outputs: dict, *_: object) -> None:
        """Keep this batch's points."""
        self._prompts += outputs["prompts"]
        for sampler, images in outputs["images"].items():
            points = pl_module.backbone.encode_images(images).flatten(1).cpu()
            self._points.setdefault(sampler, []).append(points)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Log the distances, of the points of all processes."""
        backbone = cast(Toy2DBackbone, pl_module.backbone)
        gathered = gather((self._prompts, {sampler: torch.cat(points) for sampler, points in self._points.items()}))
        prompts = [prompt for share, _ in gathered for prompt in share]
        exact = backbone.exact_samples(prompts, self.seed).flatten(1)
        for sampler in self._points:
            points = torch.cat([share[sampler] for _, share in gathered])
            pl_module.log(f"val/energy_distance/{sampler}", energy_distance(points, exact).float())
