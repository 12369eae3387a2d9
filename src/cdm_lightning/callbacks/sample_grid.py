"""The callback that draws validation images during training, always with the same prompts and noise."""

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor

from cdm_lightning.ends.optional import may_fail
from cdm_lightning.evaluation.pictures import picture
from cdm_lightning.files import replacing, require_name
from cdm_lightning.kinds import FolderOfRun, Pictures

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


class SampleGrid(L.Callback):
    """After each validation, write a picture of the validation images.

    The pictures are written to `folder`, a folder in the run's folder. The picture after iteration 500 has the name
    iteration_0000500.png. Each row shows the images of one of `validation.samplers` (ways to make images, such as the
    student in 4 steps). Each column shows the images of one prompt, for the first `num_prompts` validation prompts of
    the first process. Loggers that support pictures get the picture too. Raises ValueError for `num_prompts` below 1.
    """

    def __init__(self, num_prompts: Pictures = 8, folder: FolderOfRun = "samples") -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts} must be at least 1")
        self.num_prompts = num_prompts
        self.folder = require_name(folder, "callbacks.sample_grid.folder")
        self._prompts: list[str] = []
        self._images: dict[str, list[Tensor]] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Drop the images of the previous validation."""
        self._prompts, self._images = [], {}

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", outputs: dict, *_: object) -> None:
        """Keep the images of this batch for the picture, until the images of `num_prompts` prompts are kept."""
        wanted = self.num_prompts - len(self._prompts)
        if wanted <= 0 or not trainer.is_global_zero:
            return
        self._prompts += outputs["prompts"][:wanted]
        for sampler, images in outputs["images"].items():
            self._images.setdefault(sampler, []).append(images[:wanted].float().cpu())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Write the picture and pass it to the loggers."""
        if trainer.sanity_checking or not self._images:
            return
        made = picture({name: torch.cat(images) for name, images in self._images.items()}, self._prompts)
        folder = Path(trainer.default_root_dir) / self.folder
        with may_fail(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"iteration_{pl_module.iteration:07d}.png") as temporary:
                made.save(temporary, format="PNG")
        for logger in trainer.loggers:
            if hasattr(logger, "log_picture"):
                logger.log_picture("val/samples", made, pl_module.iteration)
