"""Check a value against the annotations (kinds) of a parameter, with pydantic, and describe annotations in words."""

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, reduce
from pathlib import PurePath
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from pydantic import AfterValidator, AllowInfNan, ConfigDict, TypeAdapter, ValidationError

from cdm_lightning.kinds import Infinite, PathKind, Text

LISTS = (list, tuple, set, frozenset, Sequence, Iterable, Collection)
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
LARGE = 10_000  # larger limits are written as powers of ten


def problem_of(value: Any, kinds: Sequence[Any]) -> str | None:
    """Return what is wrong with `value`, such as "it is empty", or None if it fits one of the annotations `kinds`.

    If the type or the range is wrong, the result is "", because callers put `told(kinds)` into the message, which
    already says what is allowed. An int fits an annotation for floats. A bool does not fit an annotation for numbers.
    If only strings and paths are allowed, a number or a bool is converted to a string before the check.
    """
    plain = [kind for kind in kinds if _base(kind) in (bool, int, float, str, NoneType) or _is_choice(kind)]
    plain += [_as_text(kind) for kind in kinds if _is_path(kind)]
    if isinstance(value, bool | int | float) and is_text(kinds):
        value = str(value)
    if not plain:
        return ""
    try:
        _adapter(tuple(plain)).validate_python(value)
        return None
    except ValidationError as error:
        said = [found["ctx"]["error"] for found in error.errors() if "error" in found.get("ctx", {})]
        return str(said[0]) if said else ""


def is_text(kinds: Sequence[Any]) -> bool:
    """Return whether the annotations `kinds` allow only strings, paths and None.

    If they do, a number in a configuration is converted to a string.
    """
    given = [kind for kind in kinds if kind is not NoneType]
    return (
        bool(given)
        and all(_base(kind) is str or _is_path(kind) or _is_choice(kind) for kind in given)
        and not any(
            isinstance(choice, bool | int | float)
            for kind in given
            if _is_choice(kind)
            for choice in get_args(_base(kind))
        )
    )


@cache
def _adapter(kinds: tuple[Any, ...]) -> TypeAdapter[Any]:
    union: Any = reduce(operator.or_, map(_checked, kinds))
    return TypeAdapter(union, config=STRICT)


def _checked(kind: Any) -> Any:
    """Return the annotation with a pydantic validator for each of its marks from this package (`Text`, `PathKind`, `Infinite`)."""
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    own: list[Any] = [AfterValidator(_check_by(mark.problem)) for mark in marks if isinstance(mark, Text | PathKind)]
    if any(isinstance(mark, Infinite) for mark in marks):
        own.append(AllowInfNan(True))
        own.append(AfterValidator(_check_by(lambda value: "it is not a number" if math.isnan(value) else None)))
    return Annotated[kind, *own] if own else kind


def _check_by(problem: Callable[[Any], str | None]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if found := problem(value):
            raise ValueError(found)
        return value

    return check


def _base(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _is_choice(kind: Any) -> bool:
    return get_origin(_base(kind)) is Literal


def _is_path(kind: Any) -> bool:
    return isinstance(_base(kind), type) and issubclass(_base(kind), PurePath)


def _as_text(kind: Any) -> Any:
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return Annotated[str, *marks] if marks else str


def told(kinds: Sequence[Any]) -> str:
    """Return a description of the annotations `kinds`, such as "a whole number of at least 1 or null"."""
    return " or ".join(dict.fromkeys(map(_told, sorted(kinds, key=lambda kind: kind is NoneType))))


def _told(kind: Any) -> str:
    base, marks = _base(kind), get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    named = [mark.what for mark in marks if isinstance(mark, Text | PathKind)]
    asked = get_origin(base) or base
    if named:
        return named[0]
    if asked is Literal:
        return "one of " + ", ".join(map(str, get_args(base)))
    if asked in (int, float):
        return ("a whole number" if asked is int else "a number") + _range(marks)
    if asked in LISTS:
        of = [arg for arg in get_args(base) if arg is not Ellipsis]
        return "a list" + _entries(marks) + (f" of {told(_parts(of[0]))}" if of else "")
    names = {bool: "true or false", str: "a string", NoneType: "null"}
    if asked in names:
        return names[asked]
    if isinstance(asked, type):
        return "a mapping" if issubclass(asked, Mapping) else "a path" if _is_path(kind) else _object(asked)
    return "a function (a mapping with _target_ and _partial_: true)" if asked is Callable else str(asked)


def _object(asked: type) -> str:
    if asked.__module__ == "collections.abc":
        return "a function (a mapping with _target_ and _partial_: true)"
    return f"{asked.__name__} (a mapping with a _target_)"


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if type(hint).__name__ in ("UnionType", "_UnionGenericAlias", "Union") else (hint,)


def _range(marks: Sequence[Any]) -> str:
    words = []
    for mark in marks:
        for kind, word, name in (
            (Ge, "of at least", "ge"),
            (Gt, "above", "gt"),
            (Le, "at most", "le"),
            (Lt, "below", "lt"),
        ):
            if isinstance(mark, kind):
                words.append(f"{word} {_number(getattr(mark, name))}")
    return (" " + " and ".join(words)) if words else ""


def _number(value: float) -> str:
    is_power = value >= LARGE and 10 ** round(math.log10(value)) == value
    return f"1e{round(math.log10(value))}" if is_power else f"{value}"


def _entries(marks: Sequence[Any]) -> str:
    for mark in marks:
        if isinstance(mark, Len) and mark.min_length == mark.max_length:
            return f" with {mark.min_length} entries"
        if isinstance(mark, MinLen | Len) and mark.min_length:
            return f" with at least {mark.min_length} " + ("entry" if mark.min_length == 1 else "entries")
    return ""
