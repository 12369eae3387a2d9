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
    """Return the dotted names of the classes that may be built: those in `own`, and those that the user has added.

    The user adds a class as an entry point of the `group` in an installed package, or in the environment variable `TRUSTED`.
    Nothing is imported.
    """
    outside = {entry.value.partition(" ")[0].replace(":", ".") for entry in entry_points(group=group)}
    named = {name.strip() for name in os.environ.get(TRUSTED, "").split(",")} - {""}
    return frozenset(own) | outside | named


def require_registered(node: Any, allowed: Collection[str], where: str, group: str) -> None:
    """Raise `UserError` unless `node` can be built safely: it has a `_target_`, and all it names are in `allowed`.

    `allowed` holds dotted names of classes. All other values must be texts, numbers, truth values, null, or lists and mappings
    of them. Hydra's other keys, such as `_partial_` and `_args_`, are refused, and so are references (`${...}`), which could
    read files and environment variables. `where` is the file and the key of `node`, for messages, which also name the `group` of
    entry points in which a user registers a class.
    """
    if not isinstance(node, Mapping) or TARGET not in node:
        raise UserError(f"{where} has no {TARGET} that names its class; restore the file as training wrote it")
    _check(node, allowed, where, group, 0)


def _check(node: Any, allowed: Collection[str], where: str, group: str, depth: int) -> None:
    if depth > DEEPEST:
        raise UserError(f"{where[:100]}: more than {DEEPEST} levels deep; restore the file as training wrote it")
    if isinstance(node, Mapping):
        for name, child in node.items():
            _check_key(name, child, allowed, where, group)
            _check(child, allowed, f"{where}.{name}", group, depth + 1)
    elif isinstance(node, list):
        for number, child in enumerate(node):
            _check(child, allowed, f"{where}.{number}", group, depth + 1)
    elif isinstance(node, str) and "${" in node:
        raise UserError(f"{where}={node!r:.80}: ${{...}} in a run's folder is not resolved; write the value itself")
    elif not isinstance(node, PLAIN):
        raise UserError(
            f"{where} is a {type(node).__name__}, but must be a text, a number, true, false or null; "
            "restore the file as training wrote it"
        )


def _check_key(name: Any, child: Any, allowed: Collection[str], where: str, group: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or (name.startswith("_") and name != TARGET):
        raise UserError(
            f"{where}: the key {name!r:.80} is not allowed in the configuration of a run's folder; remove it"
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
    """Return the content of an untrusted YAML text: nested dicts, lists and plain values.

    Raises ValueError if it is not YAML, holds other objects or merged mappings (`<<`), is nested too deeply, or has more than
    `MOST_VALUES` values; a value that aliases (`*name`) repeat counts once for each place.
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
