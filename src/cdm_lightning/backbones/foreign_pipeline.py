"""Text-to-image pipelines of diffusers whose family this project does not know, such as SDXL. They are called as they are.

The folder may come from a stranger. Before anything is built, model_index.json must name classes of diffusers and
transformers only, and all weights must be safetensors files. Code from the folder or the hub is never run. Shapes:
images (B, 3, H, W) in [0, 1].
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import logging as diffusers_log
from torch import Tensor, nn

from cdm_lightning.backbones.loaded_weights import load_model, model_class, without_report
from cdm_lightning.backbones.pipeline_folder import blaming, downloading, loading, locate_index, read_index
from cdm_lightning.backbones.settings_file import read_settings
from cdm_lightning.backbones.whole_folder import INDEX, parts_of, require_contents, require_settings
from cdm_lightning.errors import UserError

NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")  # arguments of the call of a pipeline
OTHER_INPUTS = (
    "image",
    "video",
    "mask_image",
    "num_frames",
    "audio_length_in_s",
)  # it makes something else from something else
UNREPEATABLE = ("DPMSolverSDEScheduler",)  # draws noise from a generator of its own
DENOISERS = ("transformer", "unet", "prior", "decoder")  # parts whose calls are counted
SIZED = ("transformer", "unet", "vae")  # parts whose configurations tell the size of the images
TOKENIZERS = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin, transformers.FeatureExtractionMixin)
PROCESSORS = (transformers.BaseImageProcessor,)


@dataclass(frozen=True)
class ForeignPipeline:
    """A pipeline whose folder has been checked, but whose weights are not in memory yet.

    `name` is the folder or hub id that the user gave.
    """

    name: str
    folder: Path
    pipeline_class: type[DiffusionPipeline]
    index: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The name of the pipeline's class."""
        return self.pipeline_class.__name__

    @property
    def takes_guidance(self) -> bool:
        """Whether the pipeline's call has a guidance_scale."""
        return "guidance_scale" in _parameters(self.pipeline_class)

    @property
    def default_steps(self) -> int:
        """The default number of steps of the pipeline's call."""
        found = _parameters(self.pipeline_class)["num_inference_steps"].default
        return found if isinstance(found, int) else 50

    @property
    def size(self) -> tuple[int, int] | None:
        """The default (height, width) in pixels, if the configurations of the denoiser and the VAE tell it."""
        configs = {
            part: read_settings(self.folder / part / "config.json") for part in parts_of(self.index) if part in SIZED
        }
        sides = [config.get("sample_size") for part, config in configs.items() if part != "vae"]
        levels = configs.get("vae", {}).get("block_out_channels")
        if len(sides) != 1 or not isinstance(sides[0], int) or not isinstance(levels, list):
            return None
        return (side := sides[0] * 2 ** (len(levels) - 1)), side

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know."""
        found = (
            f"a {self.title} starts from noise of its own, so differences to it are paired on prompts, not on noise",
        )
        if isinstance(self.index.get("safety_checker"), list) and self.index["safety_checker"][1]:
            found += ("its safety checker is on, and replaces images that it flags by black ones",)
        return found

    def load(self, device: torch.device, dtype: torch.dtype) -> "LoadedPipeline":
        """Load all parts onto `device` in `dtype`. Raises `UserError` for files that cannot be loaded."""
        models = {
            part: load_model(kind, self.folder / part, dtype)
            for part in parts_of(self.index)
            if (kind := _model_class(*self.index[part]))
        }
        with loading(self.folder), without_report(diffusers_log):  # that a folder has no safety checker
            pipeline: Any = self.pipeline_class.from_pretrained(
                self.folder,
                **models,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        return LoadedPipeline(self, pipeline)


class LoadedPipeline:
    """A pipeline whose weights are in memory. It counts the network calls and the images that a safety checker flags."""

    def __init__(self, opened: ForeignPipeline, pipeline: Any) -> None:
        self.opened, self.pipeline = opened, pipeline
        self.counts = {"network_calls": 0.0, "flagged": 0.0}
        parts = [getattr(pipeline, name, None) for name in DENOISERS]
        for part in (part for part in parts if isinstance(part, nn.Module)):
            part.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, part: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        self.counts["network_calls"] += (
            len(tensors[0]) if tensors else 0
        )  # with guidance, a batch has two rows an image

    @torch.no_grad()
    def images(
        self, prompts: Sequence[str], generators: Sequence[torch.Generator], steps: int, guidance_scale: float
    ) -> Tensor:
        """Return the images (B, 3, H, W) in [0, 1] of B prompts, on the CPU. Each image has a random generator of its own.

        Raises `UserError` if the pipeline fails, or makes something else than finite images.
        """
        name = self.opened.name
        settings: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
        if self.opened.takes_guidance:
            settings["guidance_scale"] = guidance_scale
        with blaming(lambda reason: f"{name} cannot make images ({reason}); pass other settings or another model"):
            made = self.pipeline(prompt=list(prompts), generator=list(generators), **settings)
            images = made.images.float().cpu()
            if images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
                raise ValueError(f"its result has the shape {tuple(images.shape)}")
        if not images.isfinite().all():
            raise UserError(
                f"{name}: the images have NaN or infinite values; set --dtype float32, or copy the pipeline again"
            )
        self.counts["flagged"] += sum(map(bool, getattr(made, "nsfw_content_detected", None) or ()))
        return images.clamp(0, 1)


def open_foreign(pretrained: str, revision: str | None = None) -> ForeignPipeline:
    """Check a pipeline of any family, which is a folder or a hub id at `revision`, and return it.

    Raises `UserError` before anything of it is built, if it is no text-to-image pipeline of diffusers, names classes
    from elsewhere, or has weights that are no safetensors files.
    """
    folder = locate_index(pretrained, revision)  # of a hub id, only the index
    index = read_index(folder, pretrained)
    found = _text_to_image(index.get("_class_name"), pretrained)
    for part in parts_of(index):
        _require_known_class(part, *index[part], where=f"{pretrained}/{INDEX}")
    if not Path(pretrained).expanduser().is_dir():
        with downloading(pretrained):
            folder = Path(found.download(pretrained, revision=revision, use_safetensors=True, trust_remote_code=False))
        index = read_index(folder, pretrained)
    require_settings(folder, parts_of(index))
    require_contents(folder, parts_of(index))
    return ForeignPipeline(pretrained, folder, found, index)


def _parameters(pipeline_class: type[DiffusionPipeline]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(pipeline_class, "__call__", object)).parameters  # noqa: B004  it is a class


def _text_to_image(name: str | None, pretrained: str) -> type[DiffusionPipeline]:
    """Return the class of diffusers with this name. Raises `UserError` unless it makes images from prompts."""
    found = getattr(diffusers, name or "", None)
    is_pipeline = isinstance(found, type) and issubclass(found, DiffusionPipeline) and found is not DiffusionPipeline
    if not is_pipeline or not found.__module__.startswith("diffusers."):
        raise UserError(
            f"{pretrained} is a {name}, which is no pipeline of diffusers {diffusers.__version__}; pass a pipeline of diffusers"
        )
    parameters = _parameters(found)
    if not all(argument in parameters for argument in NEEDED) or any(other in parameters for other in OTHER_INPUTS):
        raise UserError(
            f"{pretrained} is a {name}, which does not make images from prompts alone; pass a text-to-image pipeline"
        )
    return found


def _model_class(library: str, name: str) -> type[Any] | None:
    if (library, name) == ("stable_diffusion", StableDiffusionSafetyChecker.__name__):
        return StableDiffusionSafetyChecker
    return model_class(library, name)


def _require_known_class(part: str, library: str, name: str, where: str) -> None:
    """Raise `UserError` unless a part's class is a model, scheduler, tokenizer or processor of diffusers or transformers.

    A class of transformers that chooses another one by the files ("Auto...") could run code of the folder.
    """
    found = getattr(transformers, name, None) if library == "transformers" else None
    kinds = (transformers.PreTrainedModel, *TOKENIZERS, *PROCESSORS)
    is_part = isinstance(found, type) and issubclass(found, kinds) and not name.startswith("Auto")
    if library == "transformers" and not is_part:
        raise UserError(
            f"{where}: the class of {part}, transformers.{name}, is no model, tokenizer or processor that can be loaded; use a "
            "pipeline whose parts name their classes"
        )
    if name in UNREPEATABLE:
        raise UserError(f"{where}: the noise of {name} cannot be seeded for each image; replace the scheduler")
