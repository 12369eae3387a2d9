"""`python -m cdm_lightning.export RUN --output FOLDER`: export a checkpoint's student as a pipeline folder or a LoRA.

The model family's own library loads the folder, for example `StableDiffusion3Pipeline.from_pretrained(FOLDER)`. The
folder's model card shows how to call the loaded pipeline, so that it samples at the sigmas for which the student was
trained.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdm_lightning.ends import signals

if __name__ == "__main__":  # before the imports below, because they take seconds
    signals.watch()

from cdm_lightning.config import command
from cdm_lightning.errors import UserError
from cdm_lightning.exporting.pipeline import DTYPES, check_output, export_pipeline, how_to_call, require_adapter
from cdm_lightning.kinds import FileOrFolder, Model, Pixels, Steps
from cdm_lightning.kinds.command_line import Parser, argument
from cdm_lightning.run.folder import Run
from cdm_lightning.terminal.quiet import quiet_libraries

WEIGHTS = ("student_ema", "student")
FORMS = ("pipeline", "lora", "weights", "checkpoint")
UNUSED = {  # form: options that have no effect with it
    "weights": ("nfe", "height", "width", "pretrained"),
    "checkpoint": ("nfe", "height", "width", "pretrained", "weights", "dtype"),
}
FILES = ("weights", "checkpoint")  # forms that are a single file


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
    """Export the student of a checkpoint, or of the newest checkpoint of a run, to `output`, and return its path.

    `form` says what is written:
      "pipeline"    a pipeline folder; a LoRA is fused into the network;
      "lora"        a folder with the LoRA alone;
      "weights"     a .safetensors file with the student's weights;
      "checkpoint"  a .safetensors file with the whole checkpoint, in the precision of training.

    `source` is the path of the checkpoint or of the run's folder. `nfe` is the number of network calls for an image.
    `weights` is "student", "student_ema" or "auto" (the EMA if there is one). `dtype` is "float32", "float16" or
    "bfloat16". `pretrained` is the path of the pretrained pipeline, if it has moved since training. `height` and
    `width` are the image size in pixels that the model card's example uses; the default is the training size. Raises
    `UserError` if `source` has no checkpoint that can be read, or if `export_pipeline` or `export_file` refuses an
    argument.
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
    """Write a student (`form="weights"`) or a whole checkpoint (`form="checkpoint"`) as one file, and return its path.

    The pretrained pipeline is not needed. `export_checkpoint` explains the arguments. Raises `UserError` if `output`
    exists already or does not end in .safetensors, if `source` has no checkpoint that can be read, if the checkpoint
    lacks the network `weights`, or if the file cannot be written.
    """
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
    """Return the parser of the command line."""
    made = Parser(prog="python -m cdm_lightning.export", description="Export a student as a pipeline folder or LoRA.")
    made.add_argument(
        "source",
        type=argument(FileOrFolder),
        metavar="RUN",
        help="a run folder (its newest checkpoint is used) or a checkpoint",
    )
    made.add_argument(
        "--output",
        required=True,
        type=argument(FileOrFolder),
        metavar="PATH",
        help="the folder to write (an earlier export is replaced) or the new file",
    )
    made.add_argument(
        "--nfe",
        type=argument(Steps),
        default=4,
        metavar="N",
        help="the number of steps to export for (default: %(default)s)",
    )
    made.add_argument(
        "--weights", choices=("auto", *WEIGHTS), default="auto", help="default: the EMA weights if there are any"
    )
    made.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="the dtype of the network's file (default: %(default)s)"
    )
    made.add_argument(
        "--form",
        choices=FORMS,
        default="pipeline",
        help="pipeline: a pipeline folder, with a LoRA fused in; lora: the LoRA alone; weights: the student as a "
        ".safetensors file; checkpoint: the whole checkpoint as a .safetensors file",
    )
    for side in ("height", "width"):
        what = f"the {side} in the model card's call (default: that of the run)"
        made.add_argument(f"--{side}", type=argument(Pixels), metavar="PIXELS", help=what)
    made.add_argument(
        "--pretrained",
        type=argument(Model),
        metavar="FOLDER",
        help="the pretrained pipeline, if it has moved since the run",
    )
    return made


def check_used(options: argparse.Namespace, made: argparse.ArgumentParser) -> None:
    """Raise `UserError` if an option is set that has no effect with this form."""
    for name in UNUSED.get(options.form, ()):
        value = getattr(options, name)
        if value != made.get_default(name):
            raise UserError(f"--{name} {value} has no effect with --form {options.form}; leave it out")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. If the user made a mistake, print one line about it on stderr and exit with status 2."""
    quiet_libraries()
    with command("before the student was written"):
        made = parser()
        options = made.parse_args(arguments)
        check_used(options, made)
        written = export_checkpoint(**vars(options))
        print(f"exported {'pipeline' if options.form not in FILES else options.form}: {written}")
        if options.form not in FILES and (line := how_to_call(written)):
            print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
