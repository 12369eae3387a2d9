"""Exporting a student as a pipeline folder of its model family, or as a LoRA."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cdm_lightning.errors import UserError
from cdm_lightning.files import read_text, replacing_folder
from cdm_lightning.run.folder import Run

if TYPE_CHECKING:  # these take seconds to import: --help and error messages should not wait for them
    import torch
    from torch import nn

    from cdm_lightning.backbones.base import Backbone
    from cdm_lightning.lora.weights import AdapterWeights

MARKER = "cdm_lightning_export.json"  # in every folder that `export_pipeline` wrote
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
    """Write `network` as a pipeline folder for `nfe` steps, completely or not at all, and return the folder.

    A LoRA is fused into the pretrained network, or with `form="lora"` written as a separate file. `weights` and
    `iteration` describe the network in the model card; the card's recipe and metrics are those of `run`. Raises UserError
    for an `output` that is a file, or a folder with files that no export wrote.
    """
    import torch

    output = Path(output)
    check_output(output)
    if nfe < 1 or dtype not in DTYPES:
        raise UserError(f"nfe must be at least 1 and dtype one of {', '.join(DTYPES)}, got {nfe} and {dtype}")
    save = prepare(backbone, network, form, getattr(torch, dtype))
    record = {"nfe": nfe, "weights": weights, "iteration": iteration, "dtype": dtype}
    card = model_card(output.name, record, run)
    marker = {"written_by": "cdm_lightning.export", "fingerprint": backbone.fingerprint, **record, "form": form}
    try:
        with replacing_folder(output) as temporary:
            save(temporary, nfe, card)
            (temporary / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    return output


def prepare(
    backbone: "Backbone", network: "nn.Module | AdapterWeights", form: str, dtype: "torch.dtype"
) -> Callable[[Path, int, str], None]:
    """Return the function of (folder, nfe, model card) that writes `network` in the given form.

    UserError for `form="lora"` if the network is not a LoRA.
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
    """UserError unless the student is a LoRA."""
    if not is_adapter:
        raise UserError(
            "all of this student's weights were trained, so it is not a LoRA: export it with --form pipeline, then make a "
            "LoRA by python -m cdm_lightning.extract_lora"
        )


def model_card(name: str, record: dict[str, Any], run: Run | None) -> str:
    """Return the text of the model card, with the configuration and metrics of the run, if any."""
    from cdm_lightning.exporting.model_card import ModelCard

    config = run.config() if run is not None and run.is_started else {}
    metrics = None if run is None else run.metrics()
    return ModelCard(name=name, config=config, metrics=metrics, **record).text()


def check_output(output: Path) -> None:
    """UserError unless `output` is free for an export: it does not exist, is an empty folder or is an earlier export."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; pass the name of a folder to write")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise UserError(f"{output} is not empty and was not written by an export (no {MARKER}); pass another folder")


def exported_iteration(folder: Path) -> int | None:
    """Return the iteration of the student in a folder that an export wrote; None for any other folder."""
    try:
        return int(json.loads(read_text(folder / MARKER, follow=False))["iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
