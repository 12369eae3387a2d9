"""What may be built from a configuration that somebody else may have written: a closed, registered set of classes.

A run's folder is data. Its `config.yaml` names classes, and whoever wrote the file chose them, so nothing in it is built
before all of it has been checked. What Hydra itself could build from such a file is any function that Python can find.
"""

import os
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import Any

import yaml

from cdm_lightning.errors import UserError

TARGET = "_target_"
TRUSTED = "CDM_LIGHTNING_TRUST"  # environment variable: more classes, as MODULE.CLASS, separated by commas
PLAIN = (str, int, float, bool, type(None))
DEEPEST = 20  # levels of nesting
MOST_VALUES = 200_000  # in a configuration, with a list of prompts perhaps


def registered(group: str, own: Collection[str]) -> frozenset[str]:
    """Return the classes, as MODULE.CLASS, that are `own`, an entry point of this `group` or named in `TRUSTED`.

    Nothing is imported.
    """
    outside = {entry.value.partition(" ")[0].replace(":", ".") for entry in entry_points(group=group)}
    named = {name.strip() for name in os.environ.get(TRUSTED, "").split(",")} - {""}
    return frozenset(own) | outside | named


def require_registered(node: Any, allowed: Collection[str], where: str, group: str) -> None:
    """Raise `UserError` unless `node` is a mapping whose classes, at any depth, are among `allowed` and which is plain else.

    Plain are texts, numbers, truth values and null, and lists and mappings of them. Refused are Hydra's other keys, such as
    `_partial_` and `_args_`, and interpolations, which could read files and environment variables. Messages name the place as
    `where`, and the `group` of entry points to register a class of one's own.
    """
    if not isinstance(node, Mapping) or TARGET not in node:
        raise UserError(f"{where} names no class; it is not the configuration of a run")
    _check(node, allowed, where, group, 0)


def _check(node: Any, allowed: Collection[str], where: str, group: str, depth: int) -> None:
    if depth > DEEPEST:
        raise UserError(f"{where[:100]}: nested more than {DEEPEST} levels deep; it is not the configuration of a run")
    if isinstance(node, Mapping):
        for name, child in node.items():
            _check_key(name, child, allowed, where, group)
            _check(child, allowed, f"{where}.{name}", group, depth + 1)
    elif isinstance(node, list):
        for number, child in enumerate(node):
            _check(child, allowed, f"{where}.{number}", group, depth + 1)
    elif isinstance(node, str) and "${" in node:
        raise UserError(f"{where}={node!r:.80}: a run's folder is data, and interpolations in it are not resolved")
    elif not isinstance(node, PLAIN):
        raise UserError(f"{where}: {type(node).__name__} is no plain value; it is not the configuration of a run")


def _check_key(name: Any, child: Any, allowed: Collection[str], where: str, group: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or (name.startswith("_") and name != TARGET):
        raise UserError(
            f"{where}: the key {name!r:.80} is not allowed in a run's folder, which is data and not a program"
        )
    if name == TARGET and (not isinstance(child, str) or child not in allowed):
        raise UserError(
            f"{where}.{TARGET}={child!r:.100} is not registered, so it is not built from a run's folder; if it is yours and "
            f"you trust it, register it as entry point of {group!r} or set {TRUSTED}=MODULE.CLASS"
        )


class _TreeLoader(yaml.SafeLoader):
    """Reads plain values; mappings that are merged into others (`<<`) are refused, because a few lines can fill the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merged mappings (<<) are not read")


def load_tree(text: str) -> Any:
    """Return the content of a YAML file that somebody else may have written.

    ValueError if it is not YAML, if it holds more than plain values, and if it has more than `MOST_VALUES` of them, where one
    that several places share through an alias counts at each place.
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
