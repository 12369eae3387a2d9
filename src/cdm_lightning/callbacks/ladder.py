"""The end of a run: teacher and student side by side, in figures and a picture; the student as a pipeline folder."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning as L

from cdm_lightning.ladder import LadderEvaluation
from cdm_lightning.parallel import MeshStrategy
from cdm_lightning.report import save_report, table
from cdm_lightning.sharding import put_together

if TYPE_CHECKING:
    from torch.nn import Module

    from cdm_lightning.module import CDMModule


class LadderReport(L.Callback):
    """Evaluates the ladder after the last iteration, prints the table and says where everything lies.

    The run's folder gets metrics.json, table.md, samples.png and, as `export_folder`, the student's pipeline folder for
    `export_nfe` steps. Raises `UserError` before training if the export could not be written.
    """

    def __init__(self, evaluation: LadderEvaluation, export_folder: str = "student", export_nfe: int = 4) -> None:
        self.evaluation, self.export_folder, self.export_nfe = evaluation, export_folder, export_nfe
        self.prompts = evaluation.prompts  # a text cache must hold them

    def setup(self, trainer: L.Trainer, pl_module: "CDMModule", stage: str) -> None:
        """Refuse a folder that the export would refuse hours later."""
        from cdm_lightning.export import check_output

        check_output(Path(trainer.default_root_dir) / self.export_folder)

    def on_fit_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Evaluate, export and report; all checkpoints are written by now.

        Processes that share one network must all run it: each makes all images, and the first reports.
        """
        from cdm_lightning.export import export_pipeline

        if not isinstance(trainer.strategy, MeshStrategy):
            pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the host
        folder, backbone, network = Path(trainer.default_root_dir), pl_module.backbone, pl_module.evaluated_network
        networks = {"student": network, "teacher": pl_module.networks.teacher}
        result = self.evaluation.run(backbone, networks, pl_module.compute_dtype, silent=not trainer.is_global_zero)
        network = put_together(network, backbone.build_network)
        if not trainer.is_global_zero:
            return
        paths = save_report(result, folder)
        weights = "student_ema" if pl_module.ema_updates else "student"
        exported = export_pipeline(
            backbone,
            cast("Module", network),  # the first process has all of it
            folder / self.export_folder,
            nfe=self.export_nfe,
            weights=weights,
            iteration=pl_module.iteration,
            run=folder,
        )
        print(f"\n{table(result.rows)}\n", flush=True)
        print(f"table    {_shown(paths['table.md'])} (figures: {_shown(paths['metrics.json'])})")
        print(f"picture  {_shown(paths['samples.png'])}")
        print(f"student  {_shown(exported)}", flush=True)


def _shown(path: Path) -> str:
    """The path as seen from the working folder if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
