"""`python -m cdm_lightning.export RUN --output FOLDER`: a checkpoint's student as a pipeline folder, or as a LoRA.

The model family's own library loads the folder, for example `StableDiffusion3Pipeline.from_pretrained(FOLDER)`; the plain
call that its model card shows runs the student's own sigmas.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdm_lightning.errors import UserError
from cdm_lightning.exporting.pipeline import DTYPES, check_output, export_pipeline, require_adapter
from cdm_lightning.run.folder import Run
from cdm_lightning.terminal.quiet import quiet_libraries

WEIGHTS = ("student_ema", "student")
FORMS = ("pipeline", "lora", "weights", "checkpoint")
FILES = ("weights", "checkpoint")  # forms that are one file


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    nfe: int = 4,
    weights: str = "auto",
    dtype: str = "float32",
    pretrained: str | None = None,
    form: str = "pipeline",
    height: int | None = None,
    width: int | None = None,
) -> Path:
    """Export the student of a checkpoint, or of the newest one of a run folder.

    `weights="auto"` is the average if there is one. `pretrained` replaces the pretrained pipeline of the run's
    configuration, which may have moved since. `form` is "pipeline", for a student that is a LoRA "lora", or a .safetensors
    file: "weights" of the student alone, "checkpoint" of everything, in the precision of training. `height` and `width` are
    the pixels of the call that the model card shows, by default those of the run's backbone.
    """
    if form in FILES:
        return export_file(Path(source), Path(output), weights, dtype, form)
    check_output(Path(output))
    from cdm_lightning.run.student import open_student

    found = open_student(source, weights, pretrained)
    if form == "lora":
        require_adapter(found.plan.of("student") is not None)
    backbone = found.backbone.at(height, width)
    return export_pipeline(
        backbone, found.network(), output, nfe, found.weights, found.iteration, dtype, found.run, form
    )


def export_file(source: Path, output: Path, weights: str, dtype: str, form: str) -> Path:
    """The student's weights, or a whole checkpoint, as one file; the pretrained pipeline is not needed for it."""
    import torch

    from cdm_lightning.checkpoint.single_file import check_file, write_checkpoint, write_weights
    from cdm_lightning.run.student import choose_weights

    check_file(output)
    run, checkpoint = Run.find(source)
    stored = run.checkpoint(checkpoint)
    if form == "checkpoint":
        return write_checkpoint(stored, output)
    return write_weights(
        stored, choose_weights(weights, stored.ema_updates, stored.path), getattr(torch, dtype), output
    )


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m cdm_lightning.export", description="Student to pipeline folder or LoRA."
    )
    made.add_argument("source", metavar="RUN", help="run folder (its newest checkpoint) or a checkpoint")
    made.add_argument(
        "--output", required=True, metavar="PATH", help="folder to write (an earlier export is replaced), or new file"
    )
    made.add_argument("--nfe", type=int, default=4, metavar="N", help="steps to export for (default: %(default)s)")
    made.add_argument(
        "--weights", choices=("auto", *WEIGHTS), default="auto", help="default: the average if there is one"
    )
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network's file (default: %(default)s)")
    made.add_argument(
        "--form",
        choices=FORMS,
        default="pipeline",
        help="pipeline: a LoRA is fused in; lora: its file alone; weights: the student as a .safetensors file; "
        "checkpoint: all of a checkpoint as a .safetensors file",
    )
    made.add_argument("--height", type=int, metavar="PIXELS", help="of the shown call (default: that of the run)")
    made.add_argument("--width", type=int, metavar="PIXELS", help="of the shown call (default: that of the run)")
    made.add_argument("--pretrained", metavar="FOLDER", help="the pretrained pipeline, if it has moved since the run")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a mistake of the user is one line on stderr and exit status 2."""
    quiet_libraries()
    try:
        options = parser().parse_args(arguments)
        written = export_checkpoint(**vars(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"exported {'pipeline' if options.form not in FILES else options.form}: {written}")


if __name__ == "__main__":
    main()
