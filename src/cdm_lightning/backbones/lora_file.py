"""Write and read LoRA files of diffusers, and fuse them into a network."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdm_lightning.backbones.loaded_weights import require_finite
from cdm_lightning.backbones.pipeline_folder import blaming
from cdm_lightning.errors import UserError
from cdm_lightning.lora.settings import LARGEST, flaw_of_alpha, plain_settings

if TYPE_CHECKING:
    from diffusers.loaders.peft import PeftAdapterMixin

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name for it
ADAPTER = "fused"
JOINT_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
JOINT_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


def presets(attention: tuple[str, ...], feed_forward: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return two presets, "attention" and "attention_feed_forward", by name. A preset chooses layers for a LoRA.

    A preset is a tuple of endings. A layer gets a LoRA if its name ends in one of them. "attention" holds the endings
    in `attention`, and "attention_feed_forward" holds those in `attention` and `feed_forward`.
    """
    return {"attention": attention, "attention_feed_forward": attention + feed_forward}


def write_lora_file(
    family: type[DiffusionPipeline], tensors: Mapping[str, Tensor], folder: Path, name: str = WEIGHTS
) -> Path:
    """Write the LoRA of a transformer into `folder` as the file `name`, and return the path of the file.

    `tensors` are the LoRA's tensors by name, such as "LAYER.lora_A.weight". They already include the LoRA's scale, so
    the file must be loaded with scale 1. `family` is the pipeline's class. Load the file with the method
    `load_lora_weights` of this class or, if the class has no such method, with the transformer's
    `load_lora_adapter(..., prefix=None)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(family, "save_lora_weights"):
        family.save_lora_weights(folder, transformer_lora_layers=dict(tensors), weight_name=name)
    else:
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    (folder / name).chmod(0o644)  # safetensors makes its files readable by the owner only
    return folder / name


def locate_lora(path: str | Path) -> Path:
    """Return the path of a LoRA file. `path` is the file, or a folder that contains `pytorch_lora_weights.safetensors`.

    Raises `UserError` if there is no such file, or if its name does not end in .safetensors.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / WEIGHTS
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "does not exist"
        raise UserError(f"the LoRA file {file} {what}; pass a .safetensors file or a folder that contains {WEIGHTS}")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a .safetensors file; convert it to this format")
    return file


@dataclass(frozen=True)
class OwnWeights:
    """The contents of a LoRA file that the user supplies, ready for `load_lora_adapter` of diffusers.

    - `tensors`: the LoRA's tensors. Their names begin with `prefix`, unless `prefix` is None.
    - `alphas`: the LoRA alphas of the layers, if they are stored apart from the tensors.
    - `settings`: the configuration of peft, if the file has one.
    """

    file: Path
    prefix: str | None
    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None

    def layers(self) -> dict[str, dict[str, Tensor]]:
        """Return a dictionary that maps the name of each layer to the layer's tensors by name.

        For example, {"ff.net.2": {"lora_A.weight": (rank, in), "lora_B.weight": (out, rank)}}.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            layer, _, kind = name.removeprefix(f"{self.prefix}.").partition(".lora_")
            found.setdefault(layer, {})[f"lora_{kind}"] = tensor
        return found


def read_lora_file(family: type[DiffusionPipeline], file: Path) -> OwnWeights:
    """Read the LoRA of a transformer from `file`, in any format that the pipeline class `family` can load.

    Raises `UserError` if the file is broken or has other contents than the LoRA of a transformer, if the factors A and
    B of a layer cannot be used (see `flaw_of_factors`), or if an alpha or the configuration of peft is wrong.
    """
    prefix = getattr(family, "transformer_name", "transformer") if hasattr(family, "lora_state_dict") else None
    alphas = settings = None
    with blaming(lambda reason: f"{file} cannot be read as a LoRA ({reason}); copy it again"):
        if prefix is None:
            tensors = load_file(file)
        else:
            options = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
            read: Any = getattr(family, "lora_state_dict")  # noqa: B009  not every pipeline has it
            has_alphas = "return_alphas" in signature(read).parameters
            options |= {"return_alphas": True} if has_alphas else {}
            tensors, *more, settings = read(str(file.parent), **options, return_lora_metadata=True)
            alphas = more[0] if has_alphas else None
    others = [key for key in tensors if ".lora" not in key]
    if others or not tensors:
        found = f"the tensor {others[0]}" if others else "no tensors"
        raise UserError(f"{file} is not a LoRA: it contains {found}; pass another file")
    text = [key for key in tensors if key.startswith("text_encoder")]
    if text:
        raise UserError(
            f"{file} also changes the text encoder ({text[0]}), which is not supported; pass a LoRA of the transformer only"
        )
    if prefix is not None and not all(key.startswith(f"{prefix}.") for key in tensors):
        tensors = {f"{prefix}.{key.removeprefix(f'{prefix}.')}": value for key, value in tensors.items()}
    own = OwnWeights(file, prefix, tensors, alphas or None, settings)
    for layer, factors in own.layers().items():
        if flaw := flaw_of_factors(factors):
            raise UserError(f"{file}: the layer {layer} {flaw}; make the file again")
    return replace(own, alphas=_alphas_of(own), settings=_settings_of(own))


def _alphas_of(own: OwnWeights) -> dict[str, float] | None:
    """Return the alphas as numbers. Raises `UserError` for an alpha out of range, or of a layer that the LoRA does not have."""
    found, layers = {}, own.layers()
    for name, alpha in (own.alphas or {}).items():
        value = alpha.item() if isinstance(alpha, Tensor) and alpha.numel() == 1 else alpha
        if flaw := flaw_of_alpha(value):
            raise UserError(f"{own.file}: the alpha {name} {flaw}; make the file again")
        if name.removeprefix(f"{own.prefix}.").removesuffix(".alpha").partition(".lora_")[0] not in layers:
            raise UserError(f"{own.file}: the alpha {name:.200} belongs to no layer of the LoRA; make the file again")
        found[name] = value
    return found or None


def _settings_of(own: OwnWeights) -> dict[str, Any] | None:
    """Return the safe part of the peft settings, or None if the file has none. Raises `UserError` for wrong settings."""
    if own.settings is not None and not isinstance(own.settings, Mapping):
        raise UserError(f"{own.file}: its lora_adapter_metadata must be a JSON object; make the file again")
    begin = f"{own.prefix}."
    given = {key.removeprefix(begin): value for key, value in (own.settings or {}).items() if key.startswith(begin)}
    if not given:
        return None
    ranks = {layer: factors["lora_A.weight"].shape[0] for layer, factors in own.layers().items()}
    try:
        made = plain_settings(given, own.tensors, ranks)
    except ValueError as error:
        raise UserError(f"{own.file}: its lora_adapter_metadata is wrong: {error}; make the file again") from error
    return {f"{begin}{key}": value for key, value in made.items()}


def flaw_of_factors(factors: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the LoRA factors of one layer, as a part of a message, or None if nothing is wrong.

    `factors` maps names such as "lora_A.weight" to tensors.
    """
    a, b = factors.get("lora_A.weight"), factors.get("lora_B.weight")
    if a is None or b is None:
        return f"has {', '.join(factors)} without lora_{'A' if a is None else 'B'}.weight"
    shapes = f"{list(a.shape)} and {list(b.shape)}"
    if min(a.ndim, b.ndim) < 2:
        return f"has factors of the shapes {shapes}, which are not matrices"
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        return f"has factors of the shapes {shapes}, whose ranks differ"
    for kind, tensor in factors.items():
        if not tensor.is_floating_point():
            return f"has {kind} of whole numbers"
        largest = max((bound.abs() for bound in torch.aminmax(tensor.float())), default=0)  # NaN if there is one
        if not math.isfinite(largest):
            return f"has {kind} with values that are not finite"
        if largest > LARGEST:
            return f"has {kind} with values above {LARGEST:g}"
    return None


def check_fit(own: OwnWeights, network: nn.Module) -> None:
    """Raise `UserError` unless each layer of the LoRA `own` is a layer of `network` with the same sizes.

    `network` may be on the meta device, since only shapes are used.
    """
    modules, layers, file = dict(network.named_modules()), own.layers(), own.file
    unknown = [name for name in layers if not isinstance(getattr(modules.get(name), "weight", None), Tensor)]
    if unknown:
        raise UserError(
            f"{file} is the LoRA of another model: {len(unknown)} of its {len(layers)} layers, such as {unknown[0]}, are "
            f"not in this {type(network).__name__}; pass a LoRA that was made for it"
        )
    for name, factors in layers.items():
        weight = cast(Tensor, modules[name].weight)
        if weight.ndim != factors["lora_A.weight"].ndim:
            raise UserError(
                f"{file} is the LoRA of another model: its factors for the layer {name} have "
                f"{factors['lora_A.weight'].ndim} dimensions, but this layer's weight has {weight.ndim}; "
                "pass a LoRA that was made for it"
            )
        sizes = [factors["lora_B.weight"].shape[0], factors["lora_A.weight"].shape[1]]
        if sizes != list(weight.shape[:2]):
            raise UserError(
                f"{file} is the LoRA of another model: its layer {name} is {sizes[0]} x {sizes[1]}, but this network needs "
                f"{weight.shape[0]} x {weight.shape[1]}; pass a LoRA that was made for it"
            )


def fuse_lora(network: nn.Module, own: OwnWeights, scale: float) -> None:
    """Add `scale` times the LoRA `own` to the weights of a diffusers transformer, in place, with diffusers' own loader.

    Raises `UserError` if the loader refuses the LoRA, or if a resulting weight is not finite.
    """
    adapted = cast("PeftAdapterMixin", network)
    options: Any = {} if own.alphas is None else {"network_alphas": dict(own.alphas)}
    metadata = None if own.settings is None else dict(own.settings)
    with blaming(lambda reason: f"{own.file} cannot be used as a LoRA ({reason}); make the file again"):
        adapted.load_lora_adapter(
            dict(own.tensors), prefix=own.prefix, adapter_name=ADAPTER, metadata=metadata, **options
        )
        adapted.fuse_lora(lora_scale=scale, adapter_names=[ADAPTER])
    adapted.unload_lora()
    _require_finite_sum(network, own)


def _require_finite_sum(network: nn.Module, own: OwnWeights) -> None:
    """Raise `UserError` if a weight that the LoRA changed is no longer finite."""
    for layer in own.layers():
        try:
            require_finite(cast(Tensor, network.get_submodule(layer).weight), f"{layer}.weight", own.file)
        except UserError:
            raise UserError(
                f"{own.file}: the sum of the LoRA and the weight of {layer} is not finite; "
                "lower its scale (in training: backbone.teacher_lora_scale) or make the file again"
            ) from None


def fused_network(
    family: type[DiffusionPipeline],
    load: Callable[[torch.dtype], nn.Module],
    skeleton: Callable[[], nn.Module],
    path: str | Path,
    scale: float,
    dtype: torch.dtype,
) -> nn.Module:
    """Load a network, fuse `scale` times the LoRA at `path` into it, and return it in `dtype`.

    `load(torch.float32)` loads the network. The fused weights are then converted to `dtype`, so they are rounded only
    once. `skeleton()` builds the network without weights; before the network is loaded, the LoRA is checked against
    this skeleton. `family` is the pipeline's class. Raises `UserError` for a LoRA that does not fit.
    """
    file = locate_lora(path)
    own = read_lora_file(family, file)
    with torch.device("meta"):
        check_fit(own, skeleton())
    network = load(torch.float32)
    fuse_lora(network, own, scale)
    network = network.to(dtype)
    _require_finite_sum(network, own)
    return network
