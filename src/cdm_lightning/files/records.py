"""Reading what a program has stored: JSON objects, and what is restored from them; errors name the file in one line."""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdm_lightning.errors import UserError
from cdm_lightning.files.reading import MOST_TEXT, first_line, read_text

# What wrong content raises where it is used: a list instead of an object, a text instead of a number, a missing key.
WRONG_CONTENT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def read_record(path: str | Path, cure: str, most: int = MOST_TEXT) -> dict[str, Any]:
    """Return the JSON object in a regular file; a link is not followed.

    Raises FileNotFoundError if there is no file, and `UserError`, which names the file and ends with the `cure`, for any other
    content.
    """
    try:
        found = json.loads(read_text(path, most, follow=False))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"{path} cannot be read ({reason}); {cure}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds {type(found).__name__}, not a JSON object; {cure}")
    return found


def require_entries(record: Mapping[str, Any], path: str | Path, cure: str, **kinds: type | tuple[type, ...]) -> None:
    """Raise `UserError`, which names the file, unless `record` has these entries, each of its kind.

    A whole number must not be negative, and a truth value is no number.
    """
    for name, kind in kinds.items():
        value = record.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{path}: {name} is {value!r:.60}, which is not what is stored there; {cure}")
        if kind is int and is_number and value < 0:
            raise UserError(f"{path}: {name} is {value}, which is negative; {cure}")


@contextmanager
def restoring(path: str | Path, cure: str) -> Generator[None]:
    """Turn the errors that wrong content of the file `path` raises inside the block into one `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except WRONG_CONTENT as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: does not hold what a run stores there ({reason:.120}); {cure}") from error
