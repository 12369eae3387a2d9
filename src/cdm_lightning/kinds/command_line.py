"""Arguments of the commands: checked by the same annotations as the options of a configuration, with one line for a mistake."""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, NoReturn, get_args, get_origin

from cdm_lightning.kinds.values import problem_of, told


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that prints a mistake as one line on stderr, without the usage, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit."""
        line = message.removeprefix("argument ").replace("\n", " ")
        print(f"error: {line}; --help lists the options", file=sys.stderr, flush=True)
        sys.exit(2)


def argument(kind: Any) -> Callable[[str], Any]:
    """Return the function to pass as `type` to `add_argument`, for an annotation `kind` such as `kinds.Steps`.

    It converts the text and raises `argparse.ArgumentTypeError` if the value is not allowed.
    """
    kinds = get_args(get_args(kind)[0]) if _is_path(kind) else ()
    checked = [Annotated[part, *get_args(kind)[1:]] for part in kinds] or [kind]
    number = get_args(kind)[0] if get_origin(kind) is Annotated and get_args(kind)[0] in (int, float) else str

    def convert(text: str) -> Any:
        problem, value = "", None
        with suppress(ValueError):
            value = number(text)
            problem = problem_of(value, checked)
        if problem is None:
            return value
        because = f", but {problem}" if problem else ""
        raise argparse.ArgumentTypeError(f"{text[:200]!r} must be {told(checked)}{because}")

    return convert


def _is_path(kind: Any) -> bool:
    return get_origin(kind) is Annotated and bool(get_args(get_args(kind)[0]))
