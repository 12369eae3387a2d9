"""A check, before anything is built, that a configuration's values fit the annotations of the constructors."""

import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from cdm_lightning.errors import UserError

LISTS = (list, Sequence, Iterable, Collection)
NUMBERS = {bool: (bool,), int: (int,), float: (int, float)}  # what each accepts: a truth value is not a number
VAR_POSITIONAL, VAR_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def check_arguments(node: Any, key: str) -> None:
    """Raise `UserError` for a value in `node` (named `key`) that does not fit the annotation of its parameter.

    A parameter without an annotation, or with one that says nothing about plain values, is left to the constructor.
    """
    if isinstance(node, ListConfig):
        for number, child in enumerate(node):
            check_arguments(child, f"{key}.{number}")
    if not isinstance(node, DictConfig):
        return
    annotated = _annotated(node.get("_target_"))
    for name in (name for name in node if not OmegaConf.is_missing(node, name)):
        value, where = node[name], _name_of(node, str(name), key)
        hint, default = annotated.get(str(name), (Any, None))
        if type(value) is not type(default):  # the default's type always fits: libraries write `name: int = None`
            _check_value(value, _kinds(hint), where)
        check_arguments(value, where)


def _name_of(node: DictConfig, name: str, key: str) -> str:
    """Return the dotted name of the option to set; for an interpolation, `validation.samplers` in `${validation.samplers}`."""
    raw = cast(Any, node)._get_node(name)._value() if OmegaConf.is_interpolation(node, name) else None
    is_absolute = isinstance(raw, str) and re.fullmatch(r"\$\{[a-z_][\w.]*\}", raw)
    return raw[2:-1] if isinstance(raw, str) and is_absolute else f"{key}.{name}"


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _check_value(value: Any, kinds: Sequence[Any], where: str) -> None:
    if not any(_fits(value, kind) for kind in kinds):
        told = "null" if value is None else value
        raise UserError(f"{where}={told} must be {' or '.join(dict.fromkeys(map(_told, kinds)))}")
    items = [of for kind in kinds if get_origin(kind) in LISTS for of in _kinds(get_args(kind)[0])]
    if isinstance(value, ListConfig) and items:
        for number, child in enumerate(value):
            _check_value(child, items, f"{where}.{number}")


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value fits a parameter of this kind; True if that cannot be decided here."""
    if isinstance(value, DictConfig) and "_target_" in value:
        return True  # its type is known only after the call
    asked = get_origin(kind) or kind
    if asked is Literal:  # check only the type: the constructor names the allowed values in its own error
        return any(_fits(value, type(choice)) for choice in get_args(kind))
    if asked in (Any, object) or not isinstance(asked, type):
        return True
    if asked in NUMBERS:
        return type(value) in NUMBERS[asked]
    if asked in LISTS and isinstance(value, str):
        return False  # a text is a sequence of letters, but nobody means that
    if asked is str:  # a name can look like a number or a truth value
        return isinstance(value, (str, bool, int, float))
    if issubclass(asked, PurePath) or (isinstance(value, ListConfig) and issubclass(asked, tuple | set | frozenset)):
        return value is not None
    plain = [] if isinstance(value, ListConfig) else {} if isinstance(value, DictConfig) else value
    try:
        return isinstance(plain, asked)
    except TypeError:  # a protocol, or a mapping with fixed keys
        return plain == {}


def _told(kind: Any) -> str:
    """Return the name of a kind in the words of a configuration file."""
    asked = get_origin(kind) or kind
    if asked is Literal:
        return " or ".join(map(str, get_args(kind)))
    if not isinstance(asked, type) or kind is NoneType:
        return "null" if kind is NoneType else str(kind)
    if asked in LISTS or issubclass(asked, tuple):
        return "a list" + (f" of {_told(get_args(kind)[0])}" if get_args(kind) else "")
    return "a mapping" if issubclass(asked, Mapping) else asked.__name__


def _annotated(target: Any) -> dict[str, tuple[Any, Any]]:
    """Return type and default of a `_target_`'s arguments; none if it cannot be read: instantiation reports the reason."""
    if target is None:
        return {}
    try:
        called = hydra.utils.get_object(target)
        function = called.__init__ if isinstance(called, type) else called
        hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    except Exception:
        return {}
    one = [parameter for parameter in parameters.values() if parameter.kind not in (VAR_POSITIONAL, VAR_KEYWORD)]
    return {parameter.name: (hints[parameter.name], parameter.default) for parameter in one if parameter.name in hints}
