"""Open a model that a user names on a command line.

The name is the path of a run, a checkpoint, an exported student or a pipeline folder, or the hub id of a pipeline.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_lightning.errors import UserError
from cdm_lightning.run.folder import is_run

if TYPE_CHECKING:  # these take seconds to import: --help and error messages should not wait for them
    import torch
    from torch import nn

    from cdm_lightning.backbones.base import Backbone
    from cdm_lightning.backbones.foreign_pipeline import ForeignPipeline
    from cdm_lightning.evaluation.grid import Opened
    from cdm_lightning.evaluation.measuring import Maker
    from cdm_lightning.evaluation.samplers import SamplerSpec
    from cdm_lightning.metrics.suite import MetricSuite

HASHED = (".safetensors", ".json", ".model", ".txt", ".ckpt", ".bin", ".pt")  # others, such as a card, change no image
RUN_STEPS = 4  # for a run's student: the steps that CDM (arXiv:2605.06376) trains for


@dataclass(frozen=True)
class OpenedModel:
    """A model whose settings have been read, but whose weights are not in memory yet.

    `build_network()` returns the network with its weights, in eval mode. `steps` is the number of steps in which the
    model makes an image by default. `sources` are the files and folders that hold its weights: for a run, the
    checkpoint and the pretrained pipeline.
    """

    backbone: "Backbone"
    build_network: "Callable[[], nn.Module]"
    steps: int
    sources: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    shares_noise: bool = True

    def check(self, samplers: "Sequence[SamplerSpec]", prompts: Sequence[str], metrics: "MetricSuite") -> None:
        """Raise `UserError` if the model family cannot make images of the size of one of `samplers`."""
        for spec in samplers:
            spec.check(self.backbone)

    def sizes(self, samplers: "Sequence[SamplerSpec]") -> list[tuple[int, int]]:
        """Return the sizes (height, width) of the images in pixels."""
        from cdm_lightning.evaluation.samplers import sizes_of

        return sizes_of(samplers, self.backbone)

    def maker(self, device: "torch.device", dtype: "torch.dtype", batch_size: int) -> "Maker":
        """Load the weights onto `device`, the network in `dtype`, and return an object that makes images in batches."""
        from cdm_lightning.evaluation.measuring import NetworkMaker

        self.backbone.setup(device)
        network = self.build_network().to(device, dtype).eval().requires_grad_(False)
        return NetworkMaker(self.backbone, {"student": network}, batch_size, dtype)

    def digest(self) -> str:
        """Return a hash of the names and contents of the files of weights, configurations and vocabularies in `sources`.

        Only parts of large files are hashed (see `run.inputs.content_hash`).
        """
        return digest_of(self.sources)


@dataclass(frozen=True)
class OpenedForeign:
    """A pipeline of a family that this project does not know, as a model of an evaluation (see `grid.Opened`)."""

    pipeline: "ForeignPipeline"
    shares_noise: bool = False

    @property
    def steps(self) -> int:
        """The pipeline's own default number of steps."""
        return self.pipeline.default_steps

    @property
    def notes(self) -> tuple[str, ...]:
        """That its noise is its own, and whether it has a safety checker."""
        return self.pipeline.notes

    def check(self, samplers: "Sequence[SamplerSpec]", prompts: Sequence[str], metrics: "MetricSuite") -> None:
        """Raise `UserError` if `samplers` set a shift, or a guidance scale that the pipeline does not have."""
        for spec in samplers:
            if spec.shift is not None:
                raise UserError(
                    f"sampler {spec.name!r}: the schedule of a {self.pipeline.title} is its own; leave out shift="
                )
            if spec.guidance_scale != 1 and not self.pipeline.takes_guidance:
                raise UserError(
                    f"sampler {spec.name!r}: a {self.pipeline.title} has no guidance_scale; leave out guidance="
                )

    def sizes(self, samplers: "Sequence[SamplerSpec]") -> list[tuple[int, int]]:
        """Return the default size (height, width) of the images in pixels, or nothing if it is not known."""
        return [size for size in [self.pipeline.size] if size is not None]

    def digest(self) -> str:
        """Return a hash of the files of weights, configurations and vocabularies."""
        return digest_of([self.pipeline.folder])

    def maker(self, device: "torch.device", dtype: "torch.dtype", batch_size: int) -> "Maker":
        """Load all parts of the pipeline onto `device` in `dtype`, and return an object that makes images."""
        from cdm_lightning.evaluation.foreign import ForeignMaker

        return ForeignMaker(self.pipeline.load(device, dtype))


def digest_of(sources: Sequence[Path]) -> str:
    """Return a hash of the files of weights, configurations and vocabularies in files and folders."""
    from cdm_lightning.run.inputs import describe, files_of

    found = [(name, path) for source in sources for name, path in files_of(source)]
    files = [(name, describe(path)) for name, path in found if path.suffix in HASHED]
    return hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()


def open_any(model: str) -> "Opened":
    """Open whatever the command `evaluate` can measure: what `open_sized` opens, images, and pipelines of any family.

    `model` is a path, or the hub id of a pipeline. Raises `UserError` if it can be none of these.
    """
    from cdm_lightning.evaluation.given_images import ImagesOfPrompts, holds_images

    folder = Path(model).expanduser()
    if is_run(Path(model)):
        return open_run(model, None)
    if not (folder / "model_index.json").exists() and holds_images(folder):
        return ImagesOfPrompts(folder)
    from cdm_lightning.backbones.families import is_known

    if is_known(model):
        return open_model(model)
    from cdm_lightning.backbones.foreign_pipeline import open_foreign

    return OpenedForeign(open_foreign(model))


def open_sized(model: str, lora: str | None, height: int | None, width: int | None, steps: int | None) -> OpenedModel:
    """Open `model`, which is the path of a run, a checkpoint or a pipeline folder, or the hub id of a pipeline.

    `lora` is a LoRA file or an exported LoRA to fuse into the pipeline. `height` and `width` are the size of the images
    in pixels, and `steps` is the default number of steps; None stands for the model's own value. Raises `UserError` for
    a model that cannot be opened, and for an image size that the model cannot make.
    """
    opened = open_run(model, lora) if is_run(Path(model)) else open_model(model, lora)
    return replace(opened, backbone=opened.backbone.at(height, width), steps=steps or opened.steps)


def open_run(model: str, lora: str | None) -> OpenedModel:
    """Open the student of a run or a checkpoint; `model` is the path of either.

    The attribute `steps` of the result is 4, because CDM trains students for 4 steps. Raises `UserError` if `lora` is
    given, because a LoRA can be fused only into a pipeline, and if the run has no readable checkpoint.
    """
    from cdm_lightning.run.student import open_student, plain_network

    if lora is not None:
        raise UserError(f"--lora needs a pipeline, but {model} is a run; export the run and pass the export as --model")
    found = open_student(model)
    folder = getattr(found.backbone, "folder", None)
    sources = (found.stored.path, *([folder] if isinstance(folder, Path) else []))
    return OpenedModel(found.backbone, lambda: plain_network(found.backbone, found.network()), RUN_STEPS, sources)


def open_model(model: str, lora: str | None = None) -> OpenedModel:
    """Open a pipeline, such as a teacher or an exported student. `model` is a pipeline folder or a hub id.

    `lora` is a LoRA file or an exported LoRA to fuse into the pipeline. An exported LoRA sets the image size and the
    number of steps. If `lora` is None, an exported student sets them. Otherwise they are the pipeline's own. Raises
    `UserError` for a pipeline of an unknown family.
    """
    from cdm_lightning.backbones.families import open_pipeline

    backbone, call = open_pipeline(model, lora=lora)
    steps = call.get("num_inference_steps") or backbone.call_default("num_inference_steps")
    return OpenedModel(backbone, backbone.build_teacher, steps, (backbone.folder, *([Path(lora)] if lora else [])))
