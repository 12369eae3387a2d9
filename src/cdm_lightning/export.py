"""`python -m cdm_lightning.export RUN --output FOLDER`: a checkpoint's student as a pipeline folder, or as a LoRA.

The model family's own library loads the folder, for example `StableDiffusion3Pipeline.from_pretrained(FOLDER)`; the plain
call that its model card shows runs the student's own sigmas.
"""

import argparse
import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cdm_lightning.checkpoint.folder import MARKER as COMPLETE
from cdm_lightning.checkpoint.folder import PATTERN
from cdm_lightning.errors import UserError
from cdm_lightning.quiet import quiet_libraries

if TYPE_CHECKING:  # torch and the rest take seconds to import: --help and mistakes should not wait for them
    import torch
    from torch import nn

    from cdm_lightning.backbones.base import Backbone
    from cdm_lightning.lora.weights import AdapterWeights

MARKER = "cdm_lightning_export.json"  # stands in every folder that `export_pipeline` wrote
CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.json", "checkpoints"
WEIGHTS = ("student_ema", "student")
DTYPES = ("float32", "float16", "bfloat16")
FORMS = ("pipeline", "lora", "weights", "checkpoint")
FILES = ("weights", "checkpoint")  # forms that are one file


def export_pipeline(
    backbone: "Backbone",
    network: "nn.Module | AdapterWeights",
    output: str | Path,
    nfe: int = 4,
    weights: str = "student_ema",
    iteration: int = 0,
    dtype: str = "float32",
    run: str | Path | None = None,
    form: str = "pipeline",
) -> Path:
    """Write `network` as a pipeline folder for `nfe` steps, all of it or nothing, and return the folder.

    A LoRA is fused into the pretrained network, or with `form="lora"` written as a file of its own. `weights` and
    `iteration` say which network it is; the recipe and metrics of the model card are read from the folder `run`. Raises
    UserError for an `output` that is a file or a folder that no export wrote.
    """
    import torch

    output = Path(output)
    check_output(output)
    if nfe < 1 or dtype not in DTYPES:
        raise UserError(f"nfe must be at least 1 and dtype one of {', '.join(DTYPES)}, got {nfe} and {dtype}")
    save = prepare(backbone, network, form, getattr(torch, dtype))
    record = {"nfe": nfe, "weights": weights, "iteration": iteration, "dtype": dtype}
    card = model_card(output.name, record, None if run is None else Path(run))
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save(temporary, nfe, card)
        marker = {"written_by": "cdm_lightning.export", "fingerprint": backbone.fingerprint, **record, "form": form}
        (temporary / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        put_in_place(temporary, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def prepare(
    backbone: "Backbone", network: "nn.Module | AdapterWeights", form: str, dtype: "torch.dtype"
) -> Callable[[Path, int, str], None]:
    """How `network` is written in that form: a function of (folder, nfe, model card); UserError for no LoRA as one."""
    from cdm_lightning.lora.views import AdapterView
    from cdm_lightning.lora.weights import AdapterWeights

    if isinstance(network, AdapterView):
        network = network.weights
    if form == "lora":
        require_adapter(isinstance(network, AdapterWeights))
        return partial(backbone.save_lora, cast(AdapterWeights, network).portable(dtype))
    if isinstance(network, AdapterWeights):
        network = network.fuse_into(backbone.build_network())
    elif next(network.parameters()).dtype != dtype:
        network = copy.deepcopy(network)
    return partial(backbone.save_pipeline, network.to(dtype))


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
    from cdm_lightning.trained import open_student

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
    from cdm_lightning.trained import open_checkpoint

    check_file(output)
    stored = open_checkpoint(*find_run(source))
    if form == "checkpoint":
        return write_checkpoint(stored, output)
    return write_weights(
        stored, choose_weights(weights, stored.ema_updates, stored.path), getattr(torch, dtype), output
    )


def require_adapter(is_adapter: bool) -> None:
    """UserError unless the student is a LoRA."""
    if not is_adapter:
        raise UserError(
            "all of this student's weights were trained, so it is no LoRA: export it with --form pipeline, then make one "
            "by python -m cdm_lightning.extract_lora"
        )


def find_run(source: Path) -> tuple[Path, Path | None]:
    """(run folder, checkpoint or None for the newest); UserError if `source` belongs to no run."""
    if not source.exists():
        raise UserError(f"{source} does not exist; pass a run folder or one of its checkpoints")
    is_checkpoint = not source.is_dir() or (source / COMPLETE).is_file() or PATTERN.fullmatch(source.name) is not None
    run, checkpoint = (source.absolute().parent.parent, source) if is_checkpoint else (source, None)
    if not (run / CONFIG).is_file():
        raise UserError(
            f"{run} is no run folder: it has no {CONFIG}; pass outputs/RUN or a folder in outputs/RUN/{CHECKPOINTS}"
        )
    return run, checkpoint


def read_config(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run; UserError if it cannot be read or names no backbone."""
    import yaml

    try:
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{run / CONFIG} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or "backbone" not in config:
        raise UserError(f"{run / CONFIG} names no backbone; it is not the configuration of a run")
    return config


def choose_weights(weights: str, ema_updates: int, checkpoint: Path) -> str:
    """ "auto" made definite; UserError for the average of a checkpoint that has none."""
    if weights == "auto":
        return "student_ema" if ema_updates else "student"
    if weights == "student_ema" and not ema_updates:
        raise UserError(
            f"{checkpoint} holds no running average of the student (no StudentEMA callback); use --weights student"
        )
    return weights


def model_card(name: str, record: dict[str, Any], run: Path | None) -> str:
    """The text of the card, with whatever configuration and metrics the run folder holds."""
    from cdm_lightning.model_card import ModelCard

    config = read_config(run) if run is not None and (run / CONFIG).is_file() else {}
    metrics = None
    if run is not None and (run / METRICS).is_file():
        try:
            metrics = json.loads((run / METRICS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{run / METRICS} cannot be read ({error}); mend it or remove it") from error
    return ModelCard(name=name, config=config, metrics=metrics, **record).text()


def check_output(output: Path) -> None:
    """UserError unless an export may be written to `output`: nothing there, an empty folder or an earlier export."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; pass the name of a folder to write")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise UserError(f"{output} is not empty and was not written by an export (no {MARKER}); pass another folder")


def put_in_place(temporary: Path, output: Path) -> None:
    """Rename the finished folder to its name; an earlier export is removed when the new one is complete."""
    old = temporary.with_suffix(".old")
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old, ignore_errors=True)


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
