"""A model that a user names on a command line: a run, a checkpoint, an exported student, or a pipeline folder or hub id."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_lightning.errors import UserError
from cdm_lightning.run.folder import is_run

if TYPE_CHECKING:  # these take seconds to import: --help and error messages should not wait for them
    from torch import nn

    from cdm_lightning.backbones.base import Backbone

RUN_STEPS = 4  # for a run's student: the steps that CDM (arXiv:2605.06376) trains for


@dataclass(frozen=True)
class OpenedModel:
    """A model whose settings have been read, but whose weights are not in memory yet.

    `build_network` returns the network with its weights, in eval mode. `steps` is the number of steps that the model is made for.
    `weights` is the file or folder that holds the weights, or None if there is none.
    """

    backbone: "Backbone"
    build_network: "Callable[[], nn.Module]"
    steps: int
    weights: Path | None

    def digest(self) -> str:
        """Return a hash of the files of the weights, and of the names of these files.

        Large files are hashed in part (`run.inputs.content_hash`).
        """
        from cdm_lightning.run.inputs import describe, files_of

        files = [] if self.weights is None else [(name, describe(path)) for name, path in files_of(self.weights)]
        return hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()


def open_sized(model: str, lora: str | None, height: int | None, width: int | None, steps: int | None) -> OpenedModel:
    """Return the model named `model`, a run, checkpoint, pipeline folder or hub id.

    For `height`, `width` and `steps`, None means the model's own value. Raises `UserError` for a model that cannot be opened,
    and for a size that it cannot make.
    """
    opened = open_run(model, lora) if is_run(Path(model)) else open_model(model, lora)
    return replace(opened, backbone=opened.backbone.at(height, width), steps=steps or opened.steps)


def open_run(model: str, lora: str | None) -> OpenedModel:
    """Return the student of a run or checkpoint. Its number of steps is 4, for which CDM trains.

    Raises `UserError` if `lora` is given, because only a pipeline takes one, or if the run has no readable checkpoint.
    """
    from cdm_lightning.run.student import open_student, plain_network

    if lora is not None:
        raise UserError(f"--lora needs a pipeline, but {model} is a run; export the run and pass the export as --model")
    found = open_student(model)
    return OpenedModel(
        found.backbone, lambda: plain_network(found.backbone, found.network()), RUN_STEPS, found.stored.path
    )


def open_model(model: str, lora: str | None = None) -> OpenedModel:
    """Return a pipeline, such as a teacher or an exported student. `model` is a pipeline folder or a hub id.

    If it is an exported student, or if `lora` is an exported LoRA, the image size and the number of steps are those of the
    export. Raises `UserError` for a pipeline of an unknown family.
    """
    from cdm_lightning.backbones.families import open_pipeline

    backbone, call = open_pipeline(model, lora=lora)
    steps = call.get("num_inference_steps") or backbone.call_default("num_inference_steps")
    return OpenedModel(backbone, backbone.build_teacher, steps, backbone.folder)
