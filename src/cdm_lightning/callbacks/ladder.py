"""The callback for the end of a run: it compares teacher and student by metrics and in a picture, and exports the student."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning as L

from cdm_lightning.distributed.ranks import from_first
from cdm_lightning.distributed.sharding import put_together
from cdm_lightning.distributed.strategy import MeshStrategy
from cdm_lightning.ends.optional import may_fail
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.ladder import LadderEvaluation
from cdm_lightning.evaluation.page import PAGE
from cdm_lightning.evaluation.report import METRICS, PICTURE, SCORES, TABLE, save_report, table
from cdm_lightning.evaluation.samplers import check_samplers, sizes_of
from cdm_lightning.exporting.pipeline import (
    export_pipeline,
    exported_iteration,
    how_to_call,
    rehearse_export,
    rehearse_fusion,
)
from cdm_lightning.files import require_name
from cdm_lightning.kinds import FolderOfRun, Steps
from cdm_lightning.metrics.rehearsal import rehearse
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.run.folder import Run
from cdm_lightning.run.page import save_run_page

if TYPE_CHECKING:
    from torch.nn import Module

    from cdm_lightning.module import CDMModule


OTHERS = ("checkpoints", "logs", "samples", "scores")  # folders of a run that an export must not replace


class LadderReport(L.Callback):
    """After training, measure teacher and student at several numbers of steps (the "ladder") and export the student.

    This callback prints a table of the metrics and writes metrics.json, table.md, scores.csv, samples.png and report.html into
    the run's folder. It exports the student to the pipeline folder `export_folder` in the run's folder, with a scheduler
    for `export_nfe` steps. If an earlier process has already evaluated and exported the student of the last iteration
    with the same options, only the table of these results is printed. Raises `UserError` before training if the export
    could not be written or a metric cannot measure the images.
    """

    def __init__(
        self,
        evaluation: LadderEvaluation,
        metrics: MetricSuite,
        export_folder: FolderOfRun = "student",
        export_nfe: Steps = 4,
    ) -> None:
        self.evaluation, self.metrics = evaluation, metrics
        self.export_folder = require_name(export_folder, "callbacks.ladder.export_folder")
        self.export_nfe = export_nfe
        self.prompts = evaluation.prompts  # these prompts must be in the text cache
        self._has_trained = False
        if export_nfe < 1:
            raise UserError(f"callbacks.ladder.export_nfe={export_nfe} must be at least 1")
        if export_folder in OTHERS:
            raise UserError(
                f"callbacks.ladder.export_folder={export_folder} must not be one of the run's other folders "
                f"({', '.join(OTHERS)}); set another name"
            )

    def setup(self, trainer: L.Trainer, pl_module: "CDMModule", stage: str) -> None:
        """Check the metrics and the image sizes, and check that all files of the export except weights can be written.

        Raises `UserError` for the first mistake.
        """
        self.evaluation.check(self.metrics)
        check_samplers(self.evaluation.samplers, pl_module.backbone)
        if trainer.is_global_zero:
            run = Run(Path(trainer.default_root_dir))
            rehearse_export(pl_module.backbone, run.folder / self.export_folder, self.export_nfe, run)

    def on_fit_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Let the metrics measure two made-up images, and fuse a LoRA without weights, before the first step.

        Raises `UserError` if a metric fails, or if the student's LoRA cannot be fused.
        """
        if trainer.is_global_zero:
            rehearse_fusion(pl_module.backbone, pl_module.networks.student)
        sizes = sizes_of(self.evaluation.samplers, pl_module.backbone)
        rehearse(self.metrics, sizes, [self.prompts[number] for number in (0, 1)], trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", *_: object) -> None:
        """Remember that an iteration was trained, so that `on_fit_end` makes new results even if there are old ones."""
        self._has_trained = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Evaluate teacher and student, export the student and report the results.

        Lightning calls this after the last checkpoint is written. Every process makes all images, because only all
        processes together can call a sharded network. Only the first process writes and prints.
        """
        run, backbone, network = Run(Path(trainer.default_root_dir)), pl_module.backbone, pl_module.evaluated_network
        if from_first(self._is_done(run, pl_module)):
            if trainer.is_global_zero:
                rows = cast(dict, run.metrics())["rows"]
                print(
                    f"\nThe run is complete at iteration {pl_module.iteration} and has been evaluated before.",
                    flush=True,
                )
                self._show(run, rows)
            return
        if not isinstance(trainer.strategy, MeshStrategy):
            pl_module.to(trainer.strategy.root_device)  # another trainer than `train` makes has moved it to the host
        networks = {"student": network, "teacher": pl_module.networks.teacher}
        result = self.evaluation.run(
            self.metrics, backbone, networks, pl_module.compute_dtype, silent=not trainer.is_global_zero
        )
        network = put_together(network, backbone.build_network)
        if not trainer.is_global_zero:
            return
        result.settings.update(self._identity(run, pl_module))
        save_report(result, run.folder)
        with may_fail(run.folder / PAGE, Exception):  # whatever a page cannot show, the student must be exported
            save_run_page(run, result, self.evaluation, self.metrics, backbone)
        export_pipeline(
            backbone,
            cast("Module", network),  # the first process has the whole network
            run.folder / self.export_folder,
            nfe=self.export_nfe,
            weights="student_ema" if pl_module.ema_updates else "student",
            iteration=pl_module.iteration,
            run=run,
        )
        self._show(run, result.rows)

    def _is_done(self, run: Run, pl_module: "CDMModule") -> bool:
        """Return whether the folder holds complete results of this evaluation, and no iteration was trained since."""
        try:
            metrics = run.metrics()
        except UserError:
            return False
        if self._has_trained or not isinstance(metrics, dict) or not isinstance(metrics.get("settings"), dict):
            return False
        expected = self.evaluation.settings(self.metrics, pl_module.backbone) | self._identity(run, pl_module)
        is_measured = expected.items() <= metrics["settings"].items() and isinstance(metrics.get("rows"), list)
        is_whole = all((run.folder / name).is_file() for name in (TABLE, SCORES, PICTURE))
        is_exported = exported_iteration(run.folder / self.export_folder) == pl_module.iteration
        return bool(is_measured and metrics["rows"] and is_whole and is_exported)

    def _identity(self, run: Run, pl_module: "CDMModule") -> dict[str, object]:
        """Return everything on which the results depend: the iteration, whether the EMA is measured, and the evaluation's options."""
        config = run.config() if run.is_started else {}
        options = [config.get("metric"), config.get("feature"), (config.get("callbacks") or {}).get("ladder")]
        options.append((config.get("data") or {}).get("val"))
        digest = hashlib.blake2b(json.dumps(options, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
        return {"iteration": pl_module.iteration, "ema_updates": pl_module.ema_updates, "options": digest}

    def _show(self, run: Run, rows: list[dict]) -> None:
        print(f"\n{table(rows)}\n", flush=True)
        print(f"table    {_shown(run.folder / TABLE)} (figures: {_shown(run.folder / METRICS)})")
        print(f"picture  {_shown(run.folder / PICTURE)}")
        if (run.folder / PAGE).is_file():
            print(f"report   {_shown(run.folder / PAGE)}")
        print(f"student  {_shown(run.folder / self.export_folder)}", flush=True)
        if line := how_to_call(run.folder / self.export_folder):
            print(f"         {line}", flush=True)


def _shown(path: Path) -> str:
    """Return the path relative to the working folder if it lies inside, otherwise the path unchanged."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
