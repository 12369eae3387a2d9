"""The report at the end of a run: teacher and student compared in figures and a picture, and the exported student."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning as L

from cdm_lightning.distributed.ranks import from_first
from cdm_lightning.distributed.sharding import put_together
from cdm_lightning.distributed.strategy import MeshStrategy
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.ladder import LadderEvaluation
from cdm_lightning.evaluation.report import METRICS, PICTURE, TABLE, save_report, table
from cdm_lightning.exporting.pipeline import check_output, export_pipeline, exported_iteration
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.run.folder import Run

if TYPE_CHECKING:
    from torch.nn import Module

    from cdm_lightning.module import CDMModule


class LadderReport(L.Callback):
    """Evaluate the ladder after the last iteration, print the table and say where the results are.

    The run's folder gets metrics.json, table.md, scores.csv, samples.png and, as `export_folder`, the student's pipeline
    folder for `export_nfe` steps. A run that has already been evaluated at its last iteration with the same settings is not
    evaluated again; only its table is printed. Raises `UserError` before training if the export could not be written or a
    metric does not fit the evaluation.
    """

    def __init__(
        self, evaluation: LadderEvaluation, metrics: MetricSuite, export_folder: str = "student", export_nfe: int = 4
    ) -> None:
        self.evaluation, self.metrics = evaluation, metrics
        self.export_folder, self.export_nfe = export_folder, export_nfe
        self.prompts = evaluation.prompts  # these prompts must be in the text cache

    def setup(self, trainer: L.Trainer, pl_module: "CDMModule", stage: str) -> None:
        """Raise `UserError` at the start for mistakes that would otherwise fail hours later."""
        check_output(Path(trainer.default_root_dir) / self.export_folder)
        self.evaluation.check(self.metrics)

    def on_fit_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Evaluate, export and report, after all checkpoints have been written.

        Processes that share one network must all run it, so each process makes all images and only the first one reports.
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
            pl_module.to(trainer.strategy.root_device)  # Lightning has moved the module to the host
        networks = {"student": network, "teacher": pl_module.networks.teacher}
        result = self.evaluation.run(
            self.metrics, backbone, networks, pl_module.compute_dtype, silent=not trainer.is_global_zero
        )
        network = put_together(network, backbone.build_network)
        if not trainer.is_global_zero:
            return
        result.settings["iteration"] = pl_module.iteration
        save_report(result, run.folder)
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
        """Return whether the folder holds the results of this evaluation, with these settings, at this iteration."""
        try:
            settings = (run.metrics() or {}).get("settings", {})
        except UserError:
            return False
        expected = {**self.evaluation.settings(self.metrics, pl_module.backbone), "iteration": pl_module.iteration}
        is_measured = expected.items() <= settings.items()
        return is_measured and exported_iteration(run.folder / self.export_folder) == pl_module.iteration

    def _show(self, run: Run, rows: list[dict]) -> None:
        print(f"\n{table(rows)}\n", flush=True)
        print(f"table    {_shown(run.folder / TABLE)} (figures: {_shown(run.folder / METRICS)})")
        print(f"picture  {_shown(run.folder / PICTURE)}")
        print(f"student  {_shown(run.folder / self.export_folder)}", flush=True)


def _shown(path: Path) -> str:
    """Return the path relative to the working folder if it is in it, else the path unchanged."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
