"""Check command-line arguments against the same types (kinds) as the options of a configuration.

A mistake prints one line on stderr and ends the command with exit status 2.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, NoReturn, get_args, get_origin

from cdm_lightning.kinds.values import problem_of, told


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that prints a mistake in one line on stderr and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` in one line on stderr and exit with status 2."""
        line = message.removeprefix("argument ").replace("\n", " ")
        print(f"error: {line}; --help lists the options", file=sys.stderr, flush=True)
        sys.exit(2)


def argument(kind: Any) -> Callable[[str], Any]:
    """Return a function that converts a command-line argument from text and checks it against `kind`.

    `kind` is an annotation such as `kinds.Steps`. Pass the function as `type` to `add_argument`. It raises
    `argparse.ArgumentTypeError` if the argument does not fit `kind`.
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
