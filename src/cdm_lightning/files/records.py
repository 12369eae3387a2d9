"""Reading the JSON files that earlier runs of the package have written; every error names the file and how to go on."""

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
    """Return the JSON object in the file `path`, of at most `most` bytes; a link is not followed.

    Raises FileNotFoundError if there is no file, and `UserError` if it cannot be read or holds no JSON object. `cure` says what
    the user can do then, such as "remove it", and ends the message.
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
    """Raise `UserError` unless `record`, which was read from `path`, has an entry of the given type for each name in `kinds`.

    An int must not be negative, and a bool does not count as a number. The message names the file and ends with the `cure`.
    """
    for name, kind in kinds.items():
        value = record.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{path}: the entry {name} is missing or of the wrong type ({value!r:.60}); {cure}")
        if kind is int and is_number and value < 0:
            raise UserError(f"{path}: {name} is {value}, which is negative; {cure}")


@contextmanager
def restoring(path: str | Path, cure: str) -> Generator[None]:
    """Turn errors such as KeyError inside the block, which uses the content of `path`, into a `UserError` about that file.

    `cure` says what the user can do, and ends the message.
    """
    try:
        yield
    except UserError:
        raise
    except WRONG_CONTENT as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: does not hold what a run stores there ({reason:.120}); {cure}") from error
