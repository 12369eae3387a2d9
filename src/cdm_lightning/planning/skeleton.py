"""Make a backbone build networks that have shapes but no contents.

The shapes are read from a local pipeline folder, or from one of the architecture files in this package. Each of these
files describes a known pipeline.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.pipeline_settings import DTYPES
from cdm_lightning.errors import UserError

ARCHITECTURES = Path(__file__).parents[1] / "assets" / "architectures"
TWIN = re.compile(r"\.(fp16|bf16)[.-]")


@dataclass(frozen=True)
class FrozenParts:
    """The numbers of parameters of a pipeline's frozen parts.

    `text` maps the name of a text encoder to its number of parameters, and `vae` is the number of parameters of the
    image codec. `source` says where the numbers come from. For a pipeline in a local folder it is the path of the
    folder. For a pipeline whose architecture is part of this package, it is a note on the architecture's origin.
    """

    text: dict[str, int]
    vae: int
    source: str


def hollow(backbone: Backbone) -> FrozenParts:
    """Make `backbone` build its networks without weights, and return the sizes of its frozen parts.

    Raises UserError for a model family that the planner does not support, and for a pipeline of unknown architecture.
    """
    if not isinstance(backbone, PipelineBackbone):
        raise UserError(
            f"backbone: the planner cannot plan {type(backbone).__name__}, only pipelines of diffusers; choose another backbone"
        )
    if backbone.unplannable is not None:
        raise UserError(backbone.unplannable)
    return _from_folder(backbone) if Path(backbone.pretrained).expanduser().is_dir() else _from_shipped(backbone)


def to_mode(roots: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Replace all tensors of the networks in `roots` by fake CPU tensors of `mode`, in place.

    A tensor that several networks share is replaced by one fake tensor that they share.
    """
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def blank(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            with mode:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            done[id(tensor)] = (tensor, new)  # keeps the old tensor, so that its id is not used again
        return done[id(tensor)][1]

    for module in dict.fromkeys(module for root in roots for module in root.modules()):
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for holder in holders:  # some modules have tensors in plain attributes
            for name, tensor in list(holder.items()):
                if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
                    holder[name] = blank(tensor)


def _from_folder(backbone: PipelineBackbone) -> FrozenParts:
    backbone.leave_weights_out()
    encoders = [part for part in backbone.text_parts if part.startswith("text_encoder")]
    counts = {part: count_parameters(backbone.folder / part) for part in encoders}
    return FrozenParts(counts, count_parameters(backbone.folder / "vae"), str(backbone.pretrained))


def _from_shipped(backbone: PipelineBackbone) -> FrozenParts:
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in ARCHITECTURES.glob("*.json")]
    known = {entry["hub_id"]: entry for entry in entries}
    if backbone.pretrained not in known:
        raise UserError(
            f"the planner does not know the sizes of the pipeline {backbone.pretrained}; download it and set "
            "backbone.pretrained to its folder"
        )
    entry = known[backbone.pretrained]
    backbone.leave_weights_out(entry)
    text = {part: count for part, count in entry["parameters"].items() if part != "vae"}
    return FrozenParts(text=text, vae=entry["parameters"]["vae"], source=entry["source"])


def count_parameters(folder: Path) -> int:
    """Return the number of parameters in the safetensors files of a folder, from the headers of the files.

    Files with a second copy of the weights in half precision, such as model.fp16.safetensors, are left out. Raises
    UserError if there are no safetensors files.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        if not TWIN.search(file.name):
            with safe_open(file, "pt") as content:
                names = list(content.keys())
                total += sum(_size(content.get_slice(name).get_shape()) for name in names)
    if not total:
        raise UserError(f"{folder} has no safetensors files with weights; pass a complete pipeline folder")
    return total


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def text_bytes(frozen: FrozenParts, text_dtype: str) -> int:
    """Return the bytes of all text encoders in the dtype named `text_dtype`, such as "bfloat16"."""
    return sum(frozen.text.values()) * DTYPES[text_dtype].itemsize
