"""The callback that measures the validation images during training with the metrics of the run."""

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L

from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.distributed.ranks import gather
from cdm_lightning.ends.optional import may_fail
from cdm_lightning.evaluation.report import csv_text
from cdm_lightning.evaluation.samplers import sizes_of
from cdm_lightning.files import require_name, write_text
from cdm_lightning.kinds import FolderOfRun
from cdm_lightning.metrics.rehearsal import rehearse
from cdm_lightning.metrics.suite import Collected, MetricSuite

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


class ValidationMetrics(L.Callback):
    """Measure the validation images and log `val/METRIC/SAMPLER` for each metric and each of `validation.samplers`.

    A sampler is one way to make images, such as the student in 4 steps. Each figure is computed over the images of all
    processes. Each validation also writes the scores of single images to a CSV file in `folder`, a folder in the run's
    folder. The file has one line for each sampler and prompt. After iteration 500, its name is iteration_0000500.csv.
    The feature extractors are in `metrics`, an attribute of this callback and not of the LightningModule, so
    checkpoints do not contain them.
    """

    def __init__(self, metrics: MetricSuite, folder: FolderOfRun = "scores") -> None:
        self.metrics, self.folder = metrics, require_name(folder, "callbacks.metrics.folder")
        self._collected: dict[str, Collected] = {}

    def names(self, pl_module: "CDMModule", images: int) -> list[str]:
        """Return a list with "val/METRIC/SAMPLER" for each metric and sampler of a validation with `images` prompts.

        A metric with one figure logs it under this name. A metric with several figures logs each of them as
        "val/METRIC_FIGURE/SAMPLER" instead. These longer names are not in the list. Metrics that will have no figure in
        this validation are left out (see `Metric.has_figure`).
        """
        samplers = [spec.name for spec in pl_module.samplers]
        measured = [name for name, metric in self.metrics.metrics.items() if metric.has_figure(samplers, images)]
        return [f"val/{name}/{sampler}" for name in measured for sampler in samplers]

    def setup(self, trainer: L.Trainer, pl_module: "CDMModule", stage: str) -> None:
        """Raise `UserError` before training if a metric cannot measure images of one of the validation prompts."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PromptDataModule) and trainer.limit_val_batches and pl_module.samplers:
            self.metrics.check_prompts(data.val, data.val_prompts)

    def on_fit_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Let the metrics measure made-up images before the first step. Raises `UserError` if a metric fails."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PromptDataModule) and trainer.limit_val_batches and pl_module.samplers:
            prompts = [data.val[number] for number in range(min(2, data.val_prompts))]
            rehearse(self.metrics, sizes_of(pl_module.samplers, pl_module.backbone), prompts, pl_module.device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Forget the results of the previous validation, and move all networks that measure images to the run's device.

        Before the first validation, the metrics also read their reference images.
        """
        self._collected = {}
        if not trainer.sanity_checking:
            self.metrics.prepare(pl_module.device)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", outputs: dict, *_: object) -> None:
        """Measure the images of this validation batch. `outputs["images"]` is {sampler: images}."""
        if trainer.sanity_checking:
            return
        indices, texts = outputs["indices"].tolist(), {}
        for sampler, images in outputs["images"].items():
            collected = self._collected.setdefault(sampler, Collected())
            self.metrics.measure(collected, images, outputs["prompts"], indices, texts)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Log the figures of all metrics, computed over the images of all processes, and write the scores of single images."""
        if trainer.sanity_checking or not self.metrics.metrics:
            return
        samplers: dict[str, Collected] = {}
        for share in gather(self._collected):
            for name, collected in share.items():
                samplers.setdefault(name, Collected()).add(collected)
        for sampler, row in self.metrics.figures(samplers).items():
            pl_module.log_dict({f"val/{figure}/{sampler}": value for figure, value in row.items()})
        scores = self.metrics.scores(samplers)
        if trainer.is_global_zero and scores:
            folder = Path(trainer.default_root_dir) / self.folder
            with may_fail(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / f"iteration_{pl_module.iteration:07d}.csv", csv_text(scores))
