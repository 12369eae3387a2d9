"""The settings of peft that are accepted in a LoRA file from an untrusted source.

Some settings are unsafe in such a file, because peft compiles them as regular expressions, allocates as much memory as
they request, or reads the base network's weights to apply them. Therefore ranks and layers are taken from the tensors.
Two kinds of settings are accepted. Settings that determine the effect of a loaded LoRA, such as alpha, are accepted if
their types and ranges are right. Options of training are accepted because they have no effect on a loaded LoRA.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

LARGEST = 1e6  # of an alpha and of a value in a LoRA's factors; those of real files are below 1e4
HARMLESS = {  # how a LoRA was trained, or what the tensors show anyway; no effect when a LoRA is used
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying", "runtime_config"),
}
ONLY = {  # the allowed values of other settings; eva, pissa and the like also change the base network
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
SWITCHES = {"use_rslora": None, "use_dora": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias"}  # and their tensors
LAYER = re.compile(r"\^?((?:\w|\\?\.)+)\$?")  # the whole or the end of a layer's name as a key of peft's patterns


def plain_settings(settings: Mapping[str, Any], tensors: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the arguments of peft's `LoraConfig` for a LoRA file, made from its settings and its tensors.

    `settings` maps the names of settings to values. In the file these names start with the network's name, such as
    "transformer."; here they do not. `tensors` holds the tensors by name, and `ranks` the rank of each layer's factors.
    Raises ValueError for a setting that is unknown, has a wrong type, is out of its range, or contradicts the tensors.
    """
    strange = [name for name, value in settings.items() if not _is_known(name, value)]
    if strange:
        raise ValueError(f"the setting {strange[0]}={settings[strange[0]]!r:.80} is not supported")
    switches = {name: _switch(settings.get(name, False), name) for name in SWITCHES}
    for name, part in SWITCHES.items():
        if part is not None and switches[name] != any(part in tensor for tensor in tensors):
            raise ValueError(f"{name}={switches[name]} contradicts the tensors in the file")
    rank_of, alpha_of = _patterns(settings, "rank_pattern"), _patterns(settings, "alpha_pattern")
    claimed = {layer: _for_layer(layer, rank_of, settings.get("r", 8)) for layer in ranks}
    alphas = {layer: _for_layer(layer, alpha_of, settings.get("lora_alpha", 8)) for layer in ranks}
    for layer, rank in ranks.items():
        if claimed[layer] is True or claimed[layer] != rank:
            raise ValueError(
                f"the rank {claimed[layer]!r:.80} of {layer} contradicts the tensors in the file, which have rank {rank}"
            )
        if flaw := flaw_of_alpha(alphas[layer]):
            raise ValueError(f"the alpha of {layer} {flaw}")
    first = next(iter(ranks))
    return {
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {f"^{re.escape(layer)}": a for layer, a in alphas.items() if a != alphas[first]},
        "target_modules": list(ranks),
        **switches,
    }


def flaw_of_alpha(alpha: Any) -> str | None:
    """Return what is wrong with a LoRA's alpha, for a message, or None if it is a number in the allowed range."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return f"must be a number, not {alpha!r:.80}"
    if not math.isfinite(alpha):
        return f"is {alpha}, but must be finite"
    return None if 0 <= alpha <= LARGEST else f"is {alpha:g}, but must be 0 to {LARGEST:g}"


def _is_known(name: str, value: Any) -> bool:
    if name in ONLY:
        return any(value is allowed or (isinstance(value, str) and value == allowed) for allowed in ONLY[name])
    own = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", *SWITCHES)
    return name in HARMLESS or name in own or not value  # what is off in any version of peft


def _switch(value: Any, name: str) -> bool:
    if not isinstance(value, bool | None):
        raise ValueError(f"{name}={value!r:.80} must be true or false")
    return bool(value)


def _patterns(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return peft's setting `name`, such as rank_pattern, as {pattern: value}. Raises ValueError if it is malformed.

    A pattern that starts with ^ is the whole name of a layer; any other pattern is the end of a name.
    """
    given = settings.get(name) or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping, not {given!r:.80}")
    for key in given:
        if not LAYER.fullmatch(key):
            raise ValueError(f"{key!r:.80} in {name} is not the name of a layer")
    return {key.removesuffix("$").replace("\\.", "."): value for key, value in given.items()}


def _for_layer(layer: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first pattern that fits the layer's name, or `default` if none does (see `_patterns`)."""
    for key, value in patterns.items():
        if layer == key.removeprefix("^") or (not key.startswith("^") and layer.endswith(f".{key}")):
            return value
    return default
