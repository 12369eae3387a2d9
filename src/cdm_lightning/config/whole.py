"""Check a whole training configuration before anything is built: all required options are there, and all values are allowed."""

import difflib
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cdm_lightning.config.arguments import check_arguments, check_value, value_of
from cdm_lightning.config.origin import where_set
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import FileOrFolder, FolderOfRun, FolderToWrite, Seed

TOP: dict[str, Any] = {"seed": Seed, "run_name": FolderOfRun, "output_dir": FolderToWrite, "resume": FileOrFolder}
SWITCHES = ("accept_changed_inputs",)  # truth values, which an older configuration may lack
OBJECTS = (  # groups that describe one object
    "backbone",
    "resolution",
    "lora",
    "objective",
    "schedule",
    "ema",
    "compute",
    "data",
    "trainer",
    "strategy",
    "text_cache",
    "image_cache",
    "checkpoint",
    "module",
)
FAMILIES = ("optim", "metric", "feature", "callbacks", "logger")  # groups that describe several objects by name
GLOBAL = ("experiment", "debug", "metric")  # groups whose files set options of other groups
READ_DIRECTLY = (  # options that commands read before they build an object
    "checkpoint.folder",
    "data.num_workers",
    "strategy._target_",
    "text_cache.folder",
    "trainer.devices",
    "trainer.limit_val_batches",
    "trainer.max_steps",
    "trainer.use_distributed_sampler",
)
NEEDED = ("optim",)  # those of which at least one object is required
PLAIN, SET_IN_PLAIN = "validation", ("samplers",)  # a group that describes no object: other options refer to its values


def check_config(config: DictConfig) -> None:
    """Raise `UserError` for the first option of a training configuration that is missing, is unknown or has a wrong value."""
    for key in (*TOP, *OBJECTS, *NEEDED):
        _require(key, config)
    _check_packages(config)
    for key, kind in TOP.items():
        check_value(value_of(config, key, ""), kind, key)
    for key in SWITCHES:
        check_value(config.get(key, False), bool, key)
    for key in OBJECTS:
        node = value_of(config, key, "")
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UserError(
                f"{key}={_shown(node)} must be a mapping with a _target_, the name of a class; see conf/{key}{where_set(key)}"
            )
        check_arguments(node, key)
    for key in FAMILIES:
        _check_family(value_of(config, key, "") if key in config else None, key)
    for key in READ_DIRECTLY:
        group, _, option = key.partition(".")
        _require(option, config[group], key)
    _check_unknown(config)


def _require(option: str, node: DictConfig, key: str | None = None) -> None:
    """Raise `UserError` if `node` has no such option. `key` is its dotted name (default: `option`)."""
    if option not in node:
        key = key or option
        raise UserError(
            f"the option {key} is required, but missing; set {key}=VALUE, or remove ~{key} from the command line"
        )


def _check_packages(config: DictConfig) -> None:
    """Raise `UserError` if a file sets options of other groups without the line `# @package _global_`, which allows this."""
    for group in GLOBAL:
        node = config.get(group)
        if isinstance(node, DictConfig) and (
            group not in FAMILIES or any(name in node for name in ("metric", "feature"))
        ):
            raise UserError(
                f"the file that {group}=NAME selects must begin with the line `# @package _global_`, because it sets "
                "options of other groups too; add this line at the top of the file"
            )


def _check_unknown(config: DictConfig) -> None:
    """Raise `UserError` for an option that was added with a plus sign and looks like a mistake for a known one.

    Other names may be added, as notes on the run or for references in other options. A configuration without references
    is not checked: they were resolved, for a process that a checked one has started.
    """
    known = (*TOP, *SWITCHES, *OBJECTS, *FAMILIES, PLAIN)
    plain = config.get(PLAIN)
    added = [str(key) for key in config if key not in known]
    added += [f"{PLAIN}.{key}" for key in plain if key not in SET_IN_PLAIN] if isinstance(plain, DictConfig) else []
    references = re.findall(r"\$\{[^}]*", OmegaConf.to_yaml(config)) if added else []
    for key in added if references else ():
        if any(re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", reference) for reference in references):
            continue
        near = difflib.get_close_matches(key, known, 1)
        near += [
            f"{group}.{key}" for group in OBJECTS if isinstance(config[group], DictConfig) and key in config[group]
        ]
        if near or "." in key:
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise UserError(f"the option {key} has no effect, because nothing uses it; {hint}{where_set(key)}")


def _check_family(node: Any, key: str) -> None:
    if node is None and key not in NEEDED:
        return
    if not isinstance(node, DictConfig):
        raise UserError(
            f"{key}={_shown(node)} must be a mapping from names to nodes, each with a _target_; see conf/{key}{where_set(key)}"
        )
    for name, child in node.items():
        where = f"{key}.{name}"
        if child is None and key not in NEEDED:
            continue
        if not isinstance(child, DictConfig) or "_target_" not in child:
            left = "" if key in NEEDED else f", or {where}=null to leave it out"
            raise UserError(f"{where} has no _target_; set {where}._target_=CLASS{left}")
        check_arguments(child, where)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)[:200]
