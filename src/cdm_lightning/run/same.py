"""The check whether a run may be resumed with a changed configuration.

Options in `FREE` may change, because they affect the trained weights at most by float rounding. All other options must
stay the same. The model card of an exported student lists these other options, except those of the group `backbone`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdm_lightning.config import MOVED, parameters_of
from cdm_lightning.distributed.strategy import device_count
from cdm_lightning.errors import UserError
from cdm_lightning.files import restoring
from cdm_lightning.run.folder import CONFIG

FREE = (  # groups and options that change no result: where a run is, its length, how it is computed and measured
    "run_name",
    "output_dir",
    "resume",
    "accept_changed_inputs",
    "compute",
    "validation",
    "metric",
    "feature",
    "trainer",
    "strategy",
    "checkpoint",
    "callbacks",
    "logger",
    "text_cache",  # holds the same conditioning that the text encoders would return
    "image_cache.folder",  # holds what the image codec would return
    "module.samplers",
    "data.num_workers",
    "data.worker_timeout",
    "data.val",
    "data.val_batch_size",
    "data.val_prompts",
)
TOTAL = ".learning_rate.total"  # it usually follows max_steps
FREE_ENDINGS = (TOTAL, ".cache_folder")
# Options that had another key before 2026-11-27: the old key, or the beginning of one, and the new one.
ELSEWHERE = {
    **MOVED,
    "module.student_optim.": "optim.student.",
    "module.fake_score_optim.": "optim.fake_score.",
    "callbacks.ema.": "ema.",
}
RENAMED = {  # modules whose classes a configuration names: the old and the new name
    "cdm_lightning.core.objective.": "cdm_lightning.objectives.cdm.",
    "cdm_lightning.optim.": "cdm_lightning.training.optim.",
    "cdm_lightning.resolution.": "cdm_lightning.training.resolution.",
    "cdm_lightning.callbacks.ema.StudentEMA": "cdm_lightning.training.ema.EMA",
}
DROPPED = {"module.spread_anchors": False}  # options that were removed, with the value that turned them off
ADDED = {  # options that older versions did not have, with the values that match what those versions did
    "lora._target_": "cdm_lightning.lora.plan.LoRAPlan",
    "resolution._target_": "cdm_lightning.training.resolution.OwnSize",
    "ema._target_": "cdm_lightning.training.ema.EMA",
    "ema.decay": None,
    "image_cache._target_": "cdm_lightning.data.image_cache.ImageCacheSettings",
}


def require_same_configuration(saved: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Raise `UserError` if `config` and `saved` differ in an option that affects the weights.

    `saved` is the configuration that the run in `folder` stored; if it is empty, nothing is compared. The special cases
    are:

    - The batch size per process may change if the batch size over all processes stays the same.
    - `trainer.max_steps` may change. An option `...learning_rate.total` (the iteration at which a decaying rate reaches
      0) may change too if it equals `trainer.max_steps` in both configurations.
    - An option that `saved` lacks, because an older version wrote `saved`, counts as having its default value.
    """
    if not saved:
        return
    with restoring(folder / CONFIG, "restore the file that training wrote, or set another run_name"):
        differing = differing_options(saved, config)
    if differing:
        named = ", ".join(differing[:5])
        raise UserError(
            f"{folder} holds a run with another configuration (it differs in {named}); restore these options, or set another run_name"
        )


def differing_options(saved: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return the options that affect the weights and differ between the stored configuration `saved` and the present `config`."""
    saved = without_unknown_classes(saved, config)
    before, now = without_copies(modernised(flatten(saved))), without_copies(flatten(config))
    for flat in (before, now):  # only the batch size over all processes counts
        processes = device_count(flat["trainer.devices"]) * flat["trainer.num_nodes"]
        flat["data.batch_size x processes"] = flat.pop("data.batch_size") * processes
    keys = sorted(key for key in before.keys() | now.keys() if decides(key) or not may_follow(key, before, now))
    return [key for key in keys if not is_same(key, before, now, saved, config)]


def may_follow(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether the option `key` may change with `trainer.max_steps` when a run is resumed.

    An option `...learning_rate.total` is the iteration at which a decaying rate reaches 0. It may change if it equals
    `trainer.max_steps` in both configurations, or if the rate decays in neither. For all other options the result is
    True. `before` and `now` are the stored and the present configuration as flat dicts (see `flatten`).
    """
    if not key.endswith(TOTAL):
        return True
    decays = [flat.get(key.removesuffix("total") + "decay_from", 1) != 1 for flat in (before, now)]
    follows = [flat.get(key) == flat.get("trainer.max_steps") for flat in (before, now) if key in flat]
    return not any(decays) or all(follows)


def moved_ends(saved: dict[str, Any], config: dict[str, Any]) -> str | None:
    """Return a warning if a learning rate now decays to 0 at another iteration than in `saved`, and None otherwise.

    `saved` is the configuration of the run's last start, and `config` is the configuration with which the run is resumed.
    """
    before, now = modernised(flatten(saved)), flatten(config)
    moved = {
        key: before[key]
        for key in sorted(now)
        if key.endswith(TOTAL)
        and now.get(key.removesuffix("total") + "decay_from", 1) != 1
        and before.get(key, now[key]) != now[key]
    }
    if not moved:
        return None
    key, end = next(iter(moved.items()))
    return (
        f"the learning rate now decays to 0 at iteration {now[key]} instead of {end}, because {', '.join(moved)} follows "
        f"trainer.max_steps; it may jump up at this resume; set {key}={end} to keep the earlier end"
    )


def is_same(
    key: str, before: Mapping[str, Any], now: Mapping[str, Any], saved: Mapping[str, Any], config: Mapping[str, Any]
) -> bool:
    """Return whether the option `key` has the same value in two configurations.

    `before` and `now` are the configurations as flat dicts (see `flatten`). `saved` and `config` are the same two
    configurations as nested dicts. If only one configuration has the option, the option counts as the same if its value
    there is its default. If the present version no longer has the option, it also counts as the same if its value was
    None or False, which means that it was off.
    """
    if key in before and key in now:
        return before[key] == now[key]
    if key in now:
        return is_default(key, config)
    is_gone = key in before and not has_option(key, config)  # an option of an older version, which was off
    return is_default(key, saved) or (is_gone and before[key] in (None, False))


def has_option(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether `key`, such as "optim.student.lr", is a parameter of the class that `config` names at "optim.student"."""
    *path, name = key.split(".")
    node: Any = config
    for step in path:
        node = node.get(step) if isinstance(node, Mapping) else None
    return isinstance(node, Mapping) and name in parameters_of(node.get("_target_"))


def decides(key: str) -> bool:
    """Return whether the option `key` affects the weights that a run trains.

    "optim.student.lr" does, for example, and "data.val" does not.
    """
    return not any(key == free or key.startswith(free + ".") for free in FREE) and not key.endswith(FREE_ENDINGS)


def is_default(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether the option `key`, such as "optim.student.lr", has its default value in `config`.

    The default of this option is that of the parameter `lr` in the constructor of the class that `config` names at
    "optim.student".
    """
    *path, name = key.split(".")
    if name == "_target_":  # an object that an older run does not have: look at the constructor around it
        *path, name = path
    node: Any = config
    for step in path:
        node = node.get(step) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or name not in node:
        return False  # an option that has moved
    parameter = parameters_of(node.get("_target_")).get(name)
    if parameter is None or parameter.default is parameter.empty:
        return False
    default, value = parameter.default, node[name]
    if isinstance(value, Mapping):
        return value.get("_target_") == f"{type(default).__module__}.{type(default).__qualname__}"
    return (list(default) if isinstance(default, tuple) else default) == value


def without_unknown_classes(saved: Any, config: Mapping[str, Any]) -> Any:
    """Return a copy of `saved` in which the name of each unknown class has brackets around it: "(CLASS)".

    A class is known if it is defined in this package, or if `config`, the user's own configuration, names it. The
    comparison of two configurations imports classes by name, to find the defaults of their parameters. The brackets
    prevent an import of a class that only `saved` names, because `saved` may come from a stranger's run folder.
    """
    known = {value for key, value in flatten(dict(config)).items() if key.rpartition(".")[2] == "_target_"}

    def shown(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        found = {str(key): shown(child) for key, child in node.items()}
        target = found.get("_target_")
        if isinstance(target, str) and target not in known and not target.startswith("cdm_lightning."):
            found["_target_"] = f"({target})"
        return found

    return shown(saved)


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted keys, such as "optim.student.betas".

    `prefix` is put in front of each key.
    """
    flat: dict[str, Any] = {}
    for name, child in node.items():
        flat |= flatten(child, f"{prefix}{name}.") if isinstance(child, dict) else {prefix + str(name): child}
    return flat


def without_copies(flat: dict[str, Any]) -> dict[str, Any]:
    """Return a flat configuration without the options `module.KEY` that only repeat the value of the option `KEY`."""
    return {
        key: value
        for key, value in flat.items()
        if not key.startswith("module.") or flat.get(key.removeprefix("module."), ...) != value
    }


def modernised(flat: dict[str, Any]) -> dict[str, Any]:
    """Return a flat configuration of an older version, with the names that options and classes have in this version.

    Options that this version no longer has are left out if they were off.
    Groups that the older version did not have are added, with values that give the older version's behaviour.
    """
    found: dict[str, Any] = {}
    for key, value in flat.items():
        if DROPPED.get(key, ...) == value:
            continue
        old = next((old for old in ELSEWHERE if key == old or (old.endswith(".") and key.startswith(old))), None)
        new = key if old is None else ELSEWHERE[old] + key.removeprefix(old)
        begins = next((name for name in RENAMED if isinstance(value, str) and value.startswith(name)), None)
        found[new] = value if begins is None else RENAMED[begins] + value.removeprefix(begins)
    groups = {key.partition(".")[0] for key in found}
    return {key: value for key, value in ADDED.items() if key.partition(".")[0] not in groups} | found
