"""Check that a configuration from a stranger names only registered classes, because building runs their code.

A run's folder may come from someone else, and its `config.yaml` names classes. Hydra would call any function that the file
names. Therefore everything in the file is checked before anything is built from it.
"""

import os
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from cdm_lightning.config.arguments import check_arguments
from cdm_lightning.errors import UserError

TARGET = "_target_"
TRUSTED = "CDM_LIGHTNING_TRUST"  # environment variable: more classes, as MODULE.CLASS, separated by commas
PLAIN = (str, int, float, bool, type(None))
DEEPEST = 20  # levels of nesting
MOST_VALUES = 200_000  # in a configuration, which may contain a list of prompts


def registered(group: str, own: Collection[str]) -> frozenset[str]:
    """Return the dotted names of the classes that may be built: those in `own`, and those that the user has registered.

    The user registers a class as an entry point of an installed package, in the entry-point group `group`, or in the
    environment variable CDM_LIGHTNING_TRUST. The classes are not imported.
    """
    outside = {entry.value.partition(" ")[0].replace(":", ".") for entry in entry_points(group=group)}
    named = {name.strip() for name in os.environ.get(TRUSTED, "").split(",")} - {""}
    return frozenset(own) | outside | named


def require_registered(node: Any, allowed: Collection[str], where: str, group: str) -> None:
    """Raise `UserError` unless it is safe to build an object from `node`, a part of a stranger's configuration.

    `node` must have a `_target_`. Each `_target_`, also in nested nodes, must be in `allowed`, the dotted names of
    registered classes. All other values must be strings, numbers, bools, null, or lists and mappings of them. Hydra's
    other keys, such as `_partial_`, are refused. So are references (`${...}`), because they could read files and
    environment variables.

    The error message contains `where`, the file and key of `node`. It may also contain `group`, the group of entry
    points in which the user can register a class.
    """
    if not isinstance(node, Mapping) or TARGET not in node:
        raise UserError(f"{where} has no {TARGET} with the name of a class; restore the file that training wrote")
    _check(node, allowed, where, group, 0)


def _check(node: Any, allowed: Collection[str], where: str, group: str, depth: int) -> None:
    if depth > DEEPEST:
        raise UserError(f"{where[:100]}: nested more than {DEEPEST} levels deep; restore the file that training wrote")
    if isinstance(node, Mapping):
        for name, child in node.items():
            _check_key(name, child, allowed, where, group)
            _check(child, allowed, f"{where}.{name}", group, depth + 1)
    elif isinstance(node, list):
        for number, child in enumerate(node):
            _check(child, allowed, f"{where}.{number}", group, depth + 1)
    elif isinstance(node, str) and "${" in node:
        raise UserError(
            f"{where}={node!r:.80}: references (${{...}}) are not allowed in a run's folder; write the value itself"
        )
    elif not isinstance(node, PLAIN):
        raise UserError(
            f"{where} must be a string, a number, true, false or null, not a {type(node).__name__}; "
            "restore the file that training wrote"
        )


def _check_key(name: Any, child: Any, allowed: Collection[str], where: str, group: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or (name.startswith("_") and name != TARGET):
        raise UserError(
            f"{where}: the key {name!r:.80} is not allowed in the configuration of a run's folder; remove it"
        )
    if name == TARGET and (not isinstance(child, str) or child not in allowed):
        raise UserError(
            f"{where}.{TARGET}={child!r:.100} is not a registered class; if you trust it, set the environment variable "
            f"{TRUSTED}=MODULE.CLASS, or register it as an entry point in the group {group!r}"
        )


def typed_nodes(nodes: Mapping[str, Any], file: Path) -> DictConfig:
    """Check the options in `nodes`, and return `nodes` as a configuration.

    `nodes` are parts of a stranger's configuration such as {"backbone": {...}}. `require_registered` must have accepted
    each of them. Raises `UserError` with the name of `file` unless each option is a parameter of the class that its
    node names, and its value fits the parameter's annotation.
    """
    typed = OmegaConf.create(dict(nodes))
    for key in nodes:
        try:
            check_arguments(typed[key], key)
        except UserError as error:
            raise UserError(f"{file}: {error}; restore the file that training wrote") from error
    return typed


class _TreeLoader(yaml.SafeLoader):
    """A YAML loader for plain values.

    It refuses to merge mappings (`<<`), because a few lines of merges can fill the memory.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merged mappings (<<) are not read")


def load_tree(text: str) -> Any:
    """Return the content of an untrusted YAML text as nested dicts, lists and plain values.

    Raises ValueError if the text is not YAML, contains other objects or merged mappings (`<<`), is nested too deeply, or has
    more than `MOST_VALUES` values. If aliases (`*name`) repeat a value, each repetition counts.
    """
    try:
        tree = yaml.load(text, _TreeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    values, seen = [tree], 0
    while values:
        value = values.pop()
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        seen += 1
        if seen + len(values) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
    return tree
