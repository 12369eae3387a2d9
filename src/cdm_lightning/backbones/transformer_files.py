"""Read the tensors of a pipeline's transformer one at a time, so that the whole network is never in memory."""

from functools import cached_property
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cdm_lightning.backbones.loaded_weights import require_finite
from cdm_lightning.backbones.pipeline_folder import HUB_ID, loading
from cdm_lightning.backbones.settings_file import read_settings
from cdm_lightning.backbones.whole_folder import INDEX, require_weights, weight_files
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, require_regular


class TransformerFiles:
    """The safetensors files of a pipeline's transformer. `pretrained` is the pipeline's folder or hub id.

    `tensor` reads a whole tensor from disk, and `rows` some rows of a tensor. The constructor raises `UserError` if
    there are no such files or if they cannot be read.
    """

    def __init__(self, pretrained: str) -> None:
        self.pretrained = pretrained
        self.folder = _locate(pretrained)
        require_weights(self.folder / "transformer")
        self._file_of: dict[str, Path] = {}
        try:
            for file in weight_files(self.folder / "transformer"):
                with safe_open(require_regular(file), "pt") as content:
                    self._file_of |= dict.fromkeys(content.keys(), file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the transformer of {pretrained} cannot be read ({first_line(error)}); copy or download the pipeline again"
            ) from error
        if not self._file_of:
            raise UserError(f"{pretrained} holds no transformer/*.safetensors; pass a pipeline folder")

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> list[int]:
        """Return the shape of the tensor `name`, without reading its values."""
        with safe_open(self._file_of[name], "pt") as content:
            return content.get_slice(name).get_shape()

    def tensor(self, name: str) -> Tensor:
        """Read the tensor `name` from its file, onto the CPU in the file's dtype.

        Raises `UserError` if the tensor has values that are not finite.
        """
        with safe_open(self._file_of[name], "pt") as content:
            return self._finite(name, content.get_tensor(name))

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Read rows first..end-1 (dimension 0) of the tensor `name`, onto the CPU in the file's dtype.

        Raises `UserError` if the rows have values that are not finite.
        """
        with safe_open(self._file_of[name], "pt") as content:
            return self._finite(name, content.get_slice(name)[first:end])

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        require_finite(tensor, name, self._file_of[name])
        return tensor

    @cached_property
    def family(self) -> type[DiffusionPipeline]:
        """The pipeline class that model_index.json names. Raises `UserError` if diffusers has no such class."""
        return _class(self.folder / INDEX, DiffusionPipeline)

    @cached_property
    def linear_weights(self) -> frozenset[str]:
        """The names of the tensors that are weights of linear layers.

        The network is built on the meta device to find them.
        """
        config = self.folder / "transformer" / "config.json"
        family = _class(config, ModelMixin)
        with loading(config), torch.device("meta"):
            network = family.from_config(family.load_config(config))
        return frozenset(f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear))


def require_same_shapes(base: TransformerFiles, tuned: TransformerFiles) -> None:
    """Raise `UserError` unless the transformers `base` and `tuned` have tensors of the same names and shapes."""
    differing = set(base.names) ^ set(tuned.names)
    differing |= {name for name in set(base.names) & set(tuned.names) if base.shape(name) != tuned.shape(name)}
    if differing:
        raise UserError(
            f"{tuned.pretrained} was not tuned from {base.pretrained}: the tensor {sorted(differing)[0]} differs in shape or is "
            "missing in one of the two; pass the base model that it was tuned from"
        )


def _locate(pretrained: str) -> Path:
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(pretrained):
        raise UserError(f"the folder {pretrained} does not exist; pass a pipeline folder or a hub id (owner/name)")
    try:
        return Path(snapshot_download(pretrained, allow_patterns=[INDEX, "transformer/*"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{pretrained} is not a local folder and cannot be downloaded ({first_line(error)}); pass a folder"
        ) from error


def _class(file: Path, kind: type) -> type:
    """Return the diffusers class that a configuration file names. Raises `UserError` if it is not a subclass of `kind`."""
    name = read_settings(file).get("_class_name")
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserError(
            f"{file}: the class {name} is not a {kind.__name__} of diffusers; copy or download the pipeline again"
        )
    return found
