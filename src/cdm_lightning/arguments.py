"""Whether the values of a configuration are what the constructors that take them say they want, before anything is built."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cdm_lightning.errors import UserError

LISTS = (list, Sequence, Iterable, Collection)
NUMBERS = {bool: (bool,), int: (int,), float: (int, float)}  # what each takes: a truth value is no number
VAR_POSITIONAL, VAR_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def annotated(called: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Type and default of each argument that has a type, by name; none for a callable whose types cannot be read."""
    try:
        function = called.__init__ if isinstance(called, type) else called
        hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    except Exception:
        return {}
    one = [parameter for parameter in parameters.values() if parameter.kind not in (VAR_POSITIONAL, VAR_KEYWORD)]
    return {parameter.name: (hints[parameter.name], parameter.default) for parameter in one if parameter.name in hints}


def require_fit(value: Any, hint: Any, default: Any, where: str) -> None:
    """Raise UserError for the value of a key `where` that does not fit its argument's type `hint`.

    What is of its default's type is let through: many libraries write `name: int = None`.
    """
    if type(value) is not type(default):
        _require_kinds(value, _kinds(hint), where)


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _require_kinds(value: Any, kinds: Sequence[Any], where: str) -> None:
    if not any(_fits(value, kind) for kind in kinds):
        told = "null" if value is None else value
        raise UserError(f"{where}={told} must be {' or '.join(dict.fromkeys(map(_told, kinds)))}")
    items = [of for kind in kinds if get_origin(kind) in LISTS for of in _kinds(get_args(kind)[0])]
    if _is_list(value) and items:
        for number, child in enumerate(value):
            _require_kinds(child, items, f"{where}.{number}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value may be given to a parameter of this kind; True where that cannot be told."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True  # only the call shows what it gives
    asked = get_origin(kind) or kind
    if asked is Literal:  # the constructor says which ones there are
        return any(_fits(value, type(choice)) for choice in get_args(kind))
    if asked in (Any, object) or not isinstance(asked, type):
        return True
    if asked in NUMBERS:
        return type(value) in NUMBERS[asked]
    if asked is str:  # a name may look like a number
        return isinstance(value, (str, bool, int, float))
    if issubclass(asked, PurePath) or (_is_list(value) and issubclass(asked, tuple | set | frozenset)):
        return value is not None
    plain = [] if _is_list(value) else {} if isinstance(value, Mapping) else value
    try:
        return isinstance(plain, asked)
    except TypeError:  # a protocol, or a mapping of certain keys
        return plain == {}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _told(kind: Any) -> str:
    """A kind in the words of a configuration."""
    asked = get_origin(kind) or kind
    if asked is Literal:
        return " or ".join(map(str, get_args(kind)))
    if not isinstance(asked, type) or kind is NoneType:
        return "null" if kind is NoneType else str(kind)
    if asked in LISTS or issubclass(asked, tuple):
        return "a list" + (f" of {_told(get_args(kind)[0])}" if get_args(kind) else "")
    return "a mapping" if issubclass(asked, Mapping) else asked.__name__
