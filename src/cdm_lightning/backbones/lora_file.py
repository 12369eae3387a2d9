"""LoRA files of diffusers: writing them for a pipeline's own loader, reading them, and fusing them into a network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

if TYPE_CHECKING:
    from diffusers.loaders.peft import PeftAdapterMixin

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name for it
ADAPTER = "fused"
JOINT_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
JOINT_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


def presets(attention: tuple[str, ...], feed_forward: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the presets of LoRA targets that every family has, as name suffixes of its linear layers."""
    return {"attention": attention, "attention_feed_forward": attention + feed_forward}


def write_lora_file(family: type[DiffusionPipeline], tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """Write `tensors` ("LAYER.lora_A.weight", ..., scale 1) of the transformer into `folder` and return the file.

    The file is for the pipeline's `load_lora_weights` if it has that method, else for the transformer's
    `load_lora_adapter` with `prefix=None`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(family, "save_lora_weights"):
        family.save_lora_weights(folder, transformer_lora_layers=dict(tensors), weight_name=WEIGHTS)
    else:
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes its files readable by the owner only
    return folder / WEIGHTS


def locate_lora(path: str | Path) -> Path:
    """Return the safetensors file `path`, or the LoRA file in the folder `path`; UserError if there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: no such LoRA file; pass a .safetensors file or a folder that holds {WEIGHTS}")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a .safetensors file; no other format can be read, convert it")
    return file


def read_lora_file(family: type[DiffusionPipeline], file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return (the transformer's LoRA tensors by name, peft's settings or None).

    UserError for a broken file and for a file with other contents than a LoRA of the transformer.
    """
    try:
        if hasattr(family, "lora_state_dict"):
            options = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
            tensors, metadata = family.lora_state_dict(str(file.parent), **options, return_lora_metadata=True)
        else:
            tensors, metadata = load_file(file), None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as a LoRA ({first_line(error)})") from error
    others = [key for key in tensors if ".lora" not in key]
    if others or not tensors:
        raise UserError(f"{file} is not a LoRA: it holds {others[0] if others else 'nothing'}")
    text = [key for key in tensors if key.startswith("text_encoder")]
    if text:
        raise UserError(
            f"{file} changes the text encoder too ({text[0]}), which is not supported; pass a LoRA that does not"
        )
    prefix = f"{getattr(family, 'transformer_name', 'transformer')}."
    return _without(prefix, tensors), None if metadata is None else _without(prefix, metadata)


def _without(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in named.items()}


def check_fit(tensors: Mapping[str, Tensor], network: nn.Module, file: Path) -> None:
    """UserError unless every layer of the LoRA is a layer of `network` of the same size.

    `network` may be on the meta device.
    """
    modules = dict(network.named_modules())
    layers = dict.fromkeys(key.split(".lora")[0] for key in tensors)
    unknown = [name for name in layers if not isinstance(getattr(modules.get(name), "weight", None), Tensor)]
    if unknown:
        raise UserError(
            f"{file} is the LoRA of another model: {len(unknown)} of its {len(layers)} layers, such as {unknown[0]}, are "
            f"not in this {type(network).__name__}"
        )
    for name in layers:
        out_features, in_features = cast(Tensor, modules[name].weight).shape[:2]
        a, b = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        sizes = [] if a is None or b is None else [b.shape[0], a.shape[1]]
        if sizes and sizes != [out_features, in_features]:
            raise UserError(
                f"{file} is the LoRA of another model: {name} is {sizes[0]} x {sizes[1]} there, {out_features} x "
                f"{in_features} here"
            )


def fuse_lora(network: nn.Module, tensors: Mapping[str, Tensor], metadata: dict[str, Any] | None, scale: float) -> None:
    """Add `scale` times the LoRA to the weights of a diffusers transformer, in place, by diffusers' own loader."""
    adapted = cast("PeftAdapterMixin", network)
    adapted.load_lora_adapter(dict(tensors), prefix=None, adapter_name=ADAPTER, metadata=metadata)
    adapted.fuse_lora(lora_scale=scale, adapter_names=[ADAPTER])
    adapted.unload_lora()


def fused_network(
    family: type[DiffusionPipeline],
    load: Callable[[torch.dtype], nn.Module],
    skeleton: Callable[[], nn.Module],
    path: str | Path,
    scale: float,
    dtype: torch.dtype,
) -> nn.Module:
    """Return the network of `load(torch.float32)` with the LoRA file at `path` fused in, then converted to `dtype`.

    The LoRA is fused in float32, so that the sum is rounded only once. The file is checked against `skeleton()`, the
    network without weights, before any weights are loaded.
    """
    file = locate_lora(path)
    tensors, metadata = read_lora_file(family, file)
    with torch.device("meta"):
        check_fit(tensors, skeleton(), file)
    network = load(torch.float32)
    fuse_lora(network, tensors, metadata, scale)
    return network.to(dtype)
