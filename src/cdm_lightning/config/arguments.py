"""Check that each value in a configuration fits the constructor that will get it, before anything is built.

pydantic checks a value against the annotation of the constructor's parameter. `cdm_lightning.kinds` defines annotations
with ranges. The annotations of other libraries have no ranges, so `config.libraries` lists ranges for their classes.
"""

import copy
import difflib
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Len, MaxLen, MinLen
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override, open_dict

from cdm_lightning.config.libraries import instead_of, options_of, replacement_of
from cdm_lightning.config.origin import where_set
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line
from cdm_lightning.kinds.values import is_text, problem_of, told

LISTS = (list, tuple, set, frozenset, Sequence, Iterable, Collection)
VAR_POSITIONAL, VAR_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
SCALARS = (bool, int, float, str, bytes, NoneType)
OTHERS = "**"  # stands for the names of all other keyword arguments
OF_HYDRA = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def check_arguments(node: Any, key: str) -> None:
    """Raise `UserError` for the first option in `node` that is unknown or has a value that is not allowed.

    `node` is a part of the configuration and `key` its dotted name, such as "optim.student". If `node` has a
    `_target_`, which names a class, each other key must be a parameter of the class's constructor, and its value must
    fit the parameter's annotation. A parameter without an annotation accepts any value. Nodes inside `node` are checked
    in the same way.
    """
    if isinstance(node, ListConfig):
        for number, child in enumerate(node):
            check_arguments(child, f"{key}.{number}")
    if not isinstance(node, DictConfig):
        return
    target = node.get("_target_")
    if target is not None and not isinstance(target, str):
        raise UserError(f"{key}._target_={target} must be the dotted name of a class; see the files in conf/")
    _check_keys(node, key, target)
    annotated = annotations_of(target)
    for name in (name for name in node if not OmegaConf.is_missing(node, name)):
        value, where = value_of(node, name, key), _name_of(node, name, key)
        if (hint := annotated.get(str(name), annotated.get(OTHERS))) is not None and str(name) not in OF_HYDRA:
            check_value(value, hint, where)
        check_arguments(value, where)


def check_value(value: Any, hint: Any, where: str) -> None:
    """Raise `UserError` if the annotation `hint` does not allow `value`.

    `where` is the option's dotted name, for the message. If the annotation allows an object, a node with any `_target_`
    is accepted, because the type of the object is known only when it is built.
    """
    kinds = alternatives(hint)
    scalars = all(_asked(kind) in SCALARS or _asked(kind) is Literal for kind in kinds)
    if isinstance(value, DictConfig) and "_target_" in value and not scalars:
        _check_class(value, kinds, where)  # the type of what a function returns is known only after the call
        return
    if isinstance(value, ListConfig | DictConfig):
        wanted = [kind for kind in kinds if _holds(kind, value)]
        problem = None if wanted else ""
        for kind in wanted[:1]:
            problem = _wrong_length(value, kind)
            _check_items(value, kind, where)
    else:
        problem = _problem_of_value(value, kinds)
    if problem is not None:
        shown = "null" if value is None else str(value)[:200]
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value):
            shown = repr(value)  # otherwise '3' would look like the number 3, which is allowed
        because = f", but {problem}" if problem else ""
        raise UserError(f"{where}={shown} must be {told(kinds)}{because}{where_set(where)}")


def _check_class(node: DictConfig, kinds: Sequence[Any], where: str) -> None:
    """Raise `UserError` if `node` names a class that is none of `kinds`. Interfaces of Python, such as Sequence, are not checked."""
    found, asked = _found(str(node.get("_target_"))), [_asked(kind) for kind in kinds if _asked(kind) is not NoneType]
    if not isinstance(found, type) or node.get("_partial_") or not all(isinstance(kind, type) for kind in asked):
        return
    known = [kind for kind in asked if kind.__module__ not in ("builtins", "collections.abc", "typing")]
    if asked and len(known) == len(asked) and not any(_is_of(found, kind) for kind in known):
        key = f"{where}._target_"
        raise UserError(
            f"{key}={node._target_} is the class {found.__name__}, but {where} must be {told(kinds)}{where_set(key)}"
        )


def _is_of(found: type, kind: type) -> bool:
    if not getattr(kind, "_is_protocol", False):
        return issubclass(found, kind)
    return all(hasattr(found, name) for name, member in vars(kind).items() if name[0] != "_" and callable(member))


def with_texts(node: DictConfig) -> DictConfig:
    """Return a copy of `node` in which numbers and bools are converted to strings where a parameter accepts only strings.

    For example, the name 123 becomes "123".
    """
    copied = copy.deepcopy(node)
    copied._set_parent(cast(Any, node._get_parent()))
    _write_texts(copied)
    return copied


def _write_texts(node: Any) -> None:
    if not isinstance(node, DictConfig | ListConfig) or node._is_none() or node._is_missing():
        return
    annotated = annotations_of(node.get("_target_")) if isinstance(node, DictConfig) else {}
    for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if OmegaConf.is_missing(node, name):
            continue
        value = node[name]
        if isinstance(value, bool | int | float) and is_text(alternatives(annotated.get(str(name), Any))):
            with open_dict(node), flag_override(node, "readonly", False):
                node[name] = str(value)
        elif not OmegaConf.is_interpolation(node, name):
            _write_texts(value)


def annotations_of(target: str | None) -> dict[str, Any]:
    """Return {parameter: annotation} for the class or function with the dotted name `target`.

    If it has a parameter such as `**kwargs`, the key "**" maps to the annotation of this parameter. Annotations that
    cannot be read are left out. Building the object later reports the reason.
    """
    if target is None:
        return {}
    return _annotations(target)


@cache
def _annotations(target: str) -> dict[str, Any]:
    known = options_of(target)
    try:
        called = pkgutil.resolve_name(target)
        function = called.__init__ if isinstance(called, type) else called
        parameters = inspect.signature(called).parameters
        hints = get_type_hints(function, include_extras=True)
    except Exception:
        return known
    found: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.kind is VAR_KEYWORD and parameter.name in hints:
            found[OTHERS] = hints[parameter.name]
        elif parameter.kind is not VAR_POSITIONAL and parameter.name in hints:
            hint, default = hints[parameter.name], parameter.default
            foreign = not target.startswith("cdm_lightning.") and default is not parameter.empty
            found[parameter.name] = hint | type(default) if foreign and _is_plain(hint) else hint  # `name: int = None`
    return found | known


def _check_keys(node: DictConfig, key: str, target: str | None) -> None:
    """Raise `UserError` for a key of `node` that is not a parameter of its `_target_`, or that must not be set here."""
    if target is None:
        return
    if instead := replacement_of(target):
        raise UserError(f"{key}._target_={target} cannot be used here; {instead}{where_set(f'{key}._target_')}")
    for name in map(str, node):
        if instead := instead_of(target, name):
            raise UserError(f"{key}.{name} must not be set; {instead}{where_set(f'{key}.{name}')}")
    try:
        parameters = inspect.signature(pkgutil.resolve_name(target)).parameters
    except (ValueError, TypeError):
        if not callable(_found(target)):
            raise UserError(
                f"{key}._target_={target} must be the name of a class or function{where_set(f'{key}._target_')}"
            ) from None
        return  # the class is written in C and has no signature
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{key}._target_={target} cannot be found ({why}); correct the name{where_set(f'{key}._target_')}"
        ) from error
    if any(parameter.kind is VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in (str(name) for name in node):
        if name not in parameters and name not in OF_HYDRA:
            usable = [other for other in parameters if not instead_of(target, other)]
            near = difflib.get_close_matches(name, usable, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; its options are: {', '.join(usable) or 'none'}"
            raise UserError(
                f"{key} has no option {name!r}, because {target.rpartition('.')[2]} has no such parameter{hint}"
            )


def _found(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except Exception:
        return None


def value_of(node: DictConfig, name: Any, key: str) -> Any:
    """Return the value of the key `name` in `node`, after resolving a reference such as `${data.size}`.

    `key` is the dotted name of `node`; it is "" for the whole configuration. Raises `UserError` for a reference to an
    option that does not exist.
    """
    try:
        return node[name]
    except Exception as error:  # a reference to a key that does not exist
        raw = cast(Any, node)._get_node(name)._value()
        where = f"{key}.{name}".lstrip(".")
        raise UserError(
            f"{where}={raw} cannot be resolved ({first_line(error)}); correct the name in ${{...}}{where_set(where)}"
        ) from error


def _name_of(node: DictConfig, name: Any, key: str) -> str:
    """Return the dotted name of the option that sets a value: `validation.samplers` if the value is `${validation.samplers}`."""
    raw = cast(Any, node)._get_node(name)._value() if OmegaConf.is_interpolation(node, name) else None
    is_absolute = isinstance(raw, str) and re.fullmatch(r"\$\{[a-z_][\w.]*\}", raw)
    return raw[2:-1] if isinstance(raw, str) and is_absolute else f"{key}.{name}"


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows: (int, NoneType) for `int | None`, and (int,) for `int`.

    If the whole union is `Annotated`, its metadata is added to each type.
    """
    if get_origin(hint) is Annotated and get_origin(get_args(hint)[0]) in (Union, UnionType):
        base, *marks = get_args(hint)
        return tuple(Annotated[kind, *marks] for part in get_args(base) for kind in alternatives(part))
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in alternatives(part))
    return (NoneType if hint is None else hint,)


def base_of(kind: Any) -> Any:
    """Return an annotation without its metadata, for example int for `Annotated[int, Ge(1)]`."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _asked(kind: Any) -> Any:
    base = base_of(kind)
    return get_origin(base) or base


def _is_plain(kind: Any) -> bool:
    """Return whether a configuration file can contain a value of the type `kind` without a `_target_`.

    This is so for a single value, a list and a mapping.
    """
    asked = _asked(kind)
    if asked is Literal or asked in SCALARS or asked in LISTS or asked in (Union, UnionType):
        return True
    return isinstance(asked, type) and (issubclass(asked, Mapping) or asked.__name__ in ("Path", "PurePath"))


def _holds(kind: Any, value: ListConfig | DictConfig) -> bool:
    asked = _asked(kind)
    if not isinstance(asked, type):
        return asked is Any
    if asked is object:
        return True
    return asked in LISTS if isinstance(value, ListConfig) else issubclass(asked, Mapping)


def _wrong_length(value: ListConfig | DictConfig, kind: Any) -> str | None:
    """Return a description of a wrong number of entries, or None if the number is allowed."""
    for mark in get_args(kind)[1:] if get_origin(kind) is Annotated else ():
        least = mark.min_length if isinstance(mark, MinLen | Len) else 0
        most = mark.max_length if isinstance(mark, MaxLen | Len) else None
        if len(value) < least or (most is not None and len(value) > most):
            return f"it has {len(value)} entries"
    return None


def _check_items(value: ListConfig | DictConfig, kind: Any, where: str) -> None:
    of = [arg for arg in get_args(base_of(kind)) if arg is not Ellipsis]
    for name in value if isinstance(value, DictConfig) else range(len(value)) if of else ():
        hint = of[-1] if isinstance(value, DictConfig) else of[min(int(name), len(of) - 1)]
        check_value(value[name], hint, f"{where}.{name}")


def _problem_of_value(value: Any, kinds: Sequence[Any]) -> str | None:
    """Return what is wrong with a single value, or None if it is allowed or cannot be checked here.

    A value of a wrong type gives "", because the caller's message names the right type.
    """
    asked = [_asked(kind) for kind in kinds]
    if any(one in (Any, object) or (not isinstance(one, type) and one is not Literal) for one in asked):
        return None
    plain = [kind for kind in kinds if _is_plain(kind)]
    built = [one for one, kind in zip(asked, kinds, strict=True) if not _is_plain(kind)]
    if any(not getattr(one, "_is_protocol", False) and isinstance(value, one) for one in built):
        return None
    return problem_of(value, plain) if plain else ""
