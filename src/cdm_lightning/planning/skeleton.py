"""A backbone whose networks have shapes and no contents, from a local folder's files or from what is shipped here.

Shapes: B batch, N text tokens, D their width.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cdm_lightning.backbones.base import Backbone, Conditioning
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.pipeline_settings import DTYPES
from cdm_lightning.errors import UserError

ARCHITECTURES = Path(__file__).parents[1] / "assets" / "architectures"
CLIP_TOKENS = 77
TWIN = re.compile(r"\.(fp16|bf16)[.-]")


@dataclass(frozen=True)
class FrozenParts:
    """Weights of the parts that are not trained: text encoders and image codec, numbers of parameters by part.

    `source` says where the numbers come from.
    """

    text: dict[str, int]
    vae: int
    source: str


def hollow(backbone: Backbone) -> FrozenParts:
    """Let `backbone` build networks on the meta device in place of loaded ones; UserError if its architecture is not known here."""
    if not isinstance(backbone, PipelineBackbone):
        raise UserError(f"the planner plans pipelines of diffusers; {type(backbone).__name__} is none")
    if backbone.title == "Z-Image":  # it asks for numbers, and blank tensors have none
        raise UserError(
            "Z-Image cannot be planned: its network cuts each text to its own length, which is not known here"
        )
    frozen = _from_folder(backbone) if Path(backbone.pretrained).expanduser().is_dir() else _from_shipped(backbone)
    backbone.teacher_lora = None  # fused into the weights: it changes no size
    _ = backbone.scheduler, backbone.latent_shape  # read now: inside a mode their numbers would be blank

    def load(dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            return backbone.transformer_class(**backbone.network_config).to(dtype)

    backbone._load_pretrained = load
    return frozen


def to_mode(roots: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Put blank CPU tensors of `mode` in place of all tensors of the networks, in place; shared ones stay shared."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def blank(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            with mode:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            done[id(tensor)] = (tensor, new)  # the old one is kept, so that its id is not given to another
        return done[id(tensor)][1]

    for module in dict.fromkeys(module for root in roots for module in root.modules()):
        for holder in (module._parameters, module._buffers, module.__dict__):  # some keep tables in plain attributes
            for name, tensor in list(holder.items()):
                if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
                    holder[name] = blank(tensor)


def _from_folder(backbone: PipelineBackbone) -> FrozenParts:
    config = backbone.folder / "tokenizer" / "tokenizer_config.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    _put_codec(backbone, int(known.get("model_max_length", CLIP_TOKENS)))
    encoders = [part for part in backbone.text_parts if part.startswith("text_encoder")]
    counts = {part: count_parameters(backbone.folder / part) for part in encoders}
    return FrozenParts(counts, count_parameters(backbone.folder / "vae"), str(backbone.pretrained))


def _from_shipped(backbone: PipelineBackbone) -> FrozenParts:
    known = {}
    for file in ARCHITECTURES.glob("*.json"):
        entry = json.loads(file.read_text(encoding="utf-8"))
        known[entry["hub_id"]] = entry
    if backbone.pretrained not in known:
        raise UserError(
            f"the sizes of {backbone.pretrained} are not known here; download it and pass its folder: backbone.pretrained=FOLDER"
        )
    entry = known[backbone.pretrained]
    backbone.network_config = _with_defaults(backbone.transformer_class, entry["transformer"])
    backbone.vae_config = entry["vae"]
    backbone.scheduler = FlowMatchEulerDiscreteScheduler()  # only its number of timesteps is asked for
    _put_codec(backbone, CLIP_TOKENS)
    counts = dict(entry["parameters"])
    return FrozenParts(text={k: v for k, v in counts.items() if k != "vae"}, vae=counts["vae"], source=entry["source"])


def _with_defaults(network: type[nn.Module], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a network's constructor: its defaults and those given."""
    parameters = inspect.signature(network.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | given


def _put_codec(backbone: PipelineBackbone, clip_tokens: int) -> None:
    backbone._codec = SimpleNamespace(tokenizer_max_length=clip_tokens)


def count_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a part, twins in half precision left out; UserError if there are none."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        if not TWIN.search(file.name):
            with safe_open(file, "pt") as content:
                names = list(content.keys())
                total += sum(_size(content.get_slice(name).get_shape()) for name in names)
    if not total:
        raise UserError(f"{folder} holds no safetensors files; pass a complete pipeline folder")
    return total


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def conditioning(backbone: PipelineBackbone) -> Callable[[int], Conditioning]:
    """A function that makes the conditioning of B prompts, without contents, as the family's `encode_prompts` shapes it."""
    config, tokens = backbone.network_config, backbone.max_sequence_length
    width = next(config[key] for key in ("joint_attention_dim", "caption_channels") if key in config)
    if backbone.title == "SD3":
        tokens = clip_tokens_of(backbone) + (tokens if backbone.compact_text is None else backbone.compact_text + 1)

    def make(batch: int) -> Conditioning:
        cond: dict[str, Any] = {"prompt_embeds": torch.empty(batch, tokens, width)}
        if backbone.title in ("SD3", "FLUX"):
            cond["pooled"] = torch.empty(batch, config["pooled_projection_dim"])
        if backbone.title in ("Qwen-Image", "SANA"):
            cond["mask"] = torch.empty(
                batch, tokens, dtype=torch.bool if backbone.title == "Qwen-Image" else torch.int64
            )
        return cond

    return make


def clip_tokens_of(backbone: PipelineBackbone) -> int:
    """Tokens of CLIP, before those of T5."""
    return backbone._codec.tokenizer_max_length


def text_bytes(frozen: FrozenParts, text_dtype: str) -> int:
    """Bytes of the text encoders in `text_dtype`."""
    return sum(frozen.text.values()) * DTYPES[text_dtype].itemsize
