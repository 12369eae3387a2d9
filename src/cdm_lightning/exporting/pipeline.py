"""Export a student as a pipeline folder of its model family, or as a folder with a LoRA file."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cdm_lightning.errors import UserError
from cdm_lightning.files import PASSING, first_line, read_text, replacing_folder, restoring, scratch_folder
from cdm_lightning.run.folder import CONFIG, Run
from cdm_lightning.terminal.secrets import masked

if TYPE_CHECKING:  # these take seconds to import: --help and error messages should not wait for them
    import torch
    from torch import nn

    from cdm_lightning.backbones.base import Backbone
    from cdm_lightning.lora.weights import AdapterWeights

MARKER = "cdm_lightning_export.json"  # a file in every folder that `export_pipeline` wrote
DTYPES = ("float32", "float16", "bfloat16")


def export_pipeline(
    backbone: "Backbone",
    network: "nn.Module | AdapterWeights",
    output: str | Path,
    nfe: int = 4,
    weights: str = "student_ema",
    iteration: int = 0,
    dtype: str = "float32",
    run: Run | None = None,
    form: str = "pipeline",
) -> Path:
    """Write a student's `network` as a pipeline folder, completely or not at all, and return the folder `output`.

    `nfe` is the number of steps with which the folder's pipeline makes an image. A LoRA is fused into the pretrained
    network, or written as a LoRA file with `form="lora"`. `dtype` is "float32", "float16" or "bfloat16". The model card
    gets `weights` (the network's name) and `iteration`, and the configuration and metrics of `run`. An earlier export
    in `output` is replaced.

    Raises UserError in these cases: `output` is a file, cannot be written, or is a folder that is not empty and not an
    export; `nfe` is below 1; `dtype` is unknown; or the network is no LoRA, but `form="lora"`.
    """
    import torch

    output = Path(output)
    check_output(output)
    if nfe < 1:
        raise UserError(f"nfe={nfe} must be at least 1")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    save = prepare(backbone, network, form, getattr(torch, dtype))
    record = {"nfe": nfe, "weights": weights, "iteration": iteration, "dtype": dtype}
    card = model_card(output.name, record, run)
    marker = {"written_by": "cdm_lightning.export", "fingerprint": backbone.fingerprint, **record, "form": form}
    try:
        with replacing_folder(output) as temporary:
            save(temporary, nfe, card)
            (temporary / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); pass another folder") from error
    return output


def rehearse_export(backbone: "Backbone", output: str | Path, nfe: int, run: Run) -> None:
    """Find errors of a later `export_pipeline` before training, by a trial export that is deleted again.

    The trial writes neither weights nor the parts that an export copies from the pretrained pipeline. A full disk is no
    error here, because there may be space again after training. Raises UserError for an `output` or `nfe` that
    `export_pipeline` would refuse, and if a file cannot be written or the model card cannot be made.
    """
    output = Path(output)
    check_output(output)
    try:
        with scratch_folder(output) as folder:
            card = model_card(output.name, {"nfe": nfe, "weights": "student", "iteration": 0, "dtype": "float32"}, run)
            backbone.rehearse_export(folder, nfe, card)
    except OSError as error:
        if error.errno not in PASSING:
            raise UserError(f"{output}: cannot be written ({error.strerror or error}); set another folder") from error


def rehearse_fusion(backbone: "Backbone", network: "nn.Module") -> None:
    """Fuse the LoRA of a student's `network` on the meta device, without weights, to find errors of a later export.

    Does nothing if the network is no LoRA, or if the backbone cannot build a network without weights. Raises UserError
    if the LoRA cannot be fused.
    """
    from cdm_lightning.lora.views import AdapterView
    from cdm_lightning.lora.weights import AdapterWeights

    empty = backbone.build_empty(teacher=False) if isinstance(network, AdapterView) else None
    if not isinstance(network, AdapterView) or empty is None:
        return
    from cdm_lightning.lora.fuse import fuse  # imports peft

    tensors = {name: tensor.detach().to("meta") for name, tensor in network.weights.tensors.items()}
    try:
        fuse(AdapterWeights(network.adapter, tensors), empty)
    except Exception as error:  # of peft or torch, for a kind of layer or adapter that they cannot fuse
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"the student's LoRA cannot be fused into the pretrained network, as the export after training would do ({why}); "
            "set callbacks.ladder=null, and export the run with --form lora"
        ) from error


def prepare(
    backbone: "Backbone", network: "nn.Module | AdapterWeights", form: str, dtype: "torch.dtype"
) -> Callable[[Path, int, str], None]:
    """Return a function `save(folder, nfe, card)` that writes `network` in `dtype` into an existing folder.

    `card` is the text of the model card. With `form="lora"` the function writes a LoRA file. Otherwise it writes a
    pipeline folder, and a LoRA is fused into the pretrained network. `prepare` raises UserError for `form="lora"` if
    the network is no LoRA.
    """
    from cdm_lightning.lora.views import AdapterView
    from cdm_lightning.lora.weights import AdapterWeights

    if isinstance(network, AdapterView):
        network = network.weights
    if form == "lora":
        require_adapter(isinstance(network, AdapterWeights))
        return partial(backbone.save_lora, cast(AdapterWeights, network).portable(dtype))
    if isinstance(network, AdapterWeights):
        from cdm_lightning.lora.fuse import fuse  # imports peft

        network = fuse(network, backbone.build_network())
    elif next(network.parameters()).dtype != dtype:
        network = copy.deepcopy(network)
    return partial(backbone.save_pipeline, network.to(dtype))


def require_adapter(is_adapter: bool) -> None:
    """Raise UserError if a LoRA file was requested for a student that is no LoRA. The message says what to do instead."""
    if not is_adapter:
        raise UserError(
            "all of this student's weights were trained, so it is not a LoRA: export it with --form pipeline, then make a "
            "LoRA by python -m cdm_lightning.extract_lora"
        )


def model_card(name: str, record: dict[str, Any], run: Run | None) -> str:
    """Return the text of the model card of a student called `name`, with the configuration and metrics of `run` if given.

    `record` holds the other arguments of `ModelCard`: nfe, weights, iteration and dtype.
    """
    from cdm_lightning.exporting.model_card import ModelCard

    if run is None:
        return ModelCard(name=name, **record).text()
    metrics = run.metrics()
    with restoring(run.kept or run.folder / CONFIG, "restore the file that training wrote"):
        config = masked(run.config()) if run.is_started else {}
        return ModelCard(name=name, config=config, metrics=metrics, **record).text()


def check_output(output: Path) -> None:
    """Raise UserError unless `output` is a new folder, an empty folder or an earlier export."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; pass a folder instead")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise UserError(f"{output} is not empty and was not written by an export (no {MARKER}); pass another folder")


def how_to_call(folder: Path) -> str | None:
    """Return a line that tells the user with which arguments to call the exported pipeline.

    Returns None if the student does not run in a pipeline of diffusers (`folder` has no call.json). The line is needed
    because a folder of diffusers has no place for these arguments, and a pipeline's default guidance spoils a student's
    images.
    """
    from cdm_lightning.backbones.student_folder import read_call

    call = read_call(folder)
    if not call:
        return None
    arguments = ", ".join(f"{name}={value}" for name, value in call.items())
    return f'call it with pipe("a prompt", {arguments}): the defaults of the pipeline, such as its guidance, are not a student\'s'


def exported_iteration(folder: Path) -> int | None:
    """Return the number of training iterations of the student in an exported folder, or None for any other folder."""
    try:
        return int(json.loads(read_text(folder / MARKER, follow=False))["iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
