"""Functions that read the JSON files of earlier runs. Each error names the file and says how to continue."""

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdm_lightning.errors import UserError
from cdm_lightning.files.reading import MOST_TEXT, first_line, read_text

# The errors that wrong content causes when it is used: a list instead of an object, a string instead of a number, a missing key.
WRONG_CONTENT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
MOST = 1 << 53  # of a whole number in a record; larger ones are no counts, and other programs would round them
OF_THE_MACHINE = ("OutOfMemoryError",)  # names of errors that are not about content; torch is not imported for its own


def read_record(path: str | Path, cure: str, most: int = MOST_TEXT) -> dict[str, Any]:
    """Return the JSON object that is stored in the file `path`.

    Raises FileNotFoundError if there is no file. Raises `UserError` if the file is a link, has more than `most` bytes,
    cannot be read, or has no JSON object. `cure` is the end of the `UserError`'s message and says what the user can do,
    such as "remove it".
    """
    try:
        found = json.loads(read_text(path, most, follow=False))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"{path} cannot be read ({reason}); {cure}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must contain a JSON object, but contains a {type(found).__name__}; {cure}")
    return found


def require_entries(record: Mapping[str, Any], path: str | Path, cure: str, **kinds: type | tuple[type, ...]) -> None:
    """Raise `UserError` unless `record` has an entry of the right type for each name in `kinds`.

    For example, with `iteration=int`, `record["iteration"]` must be an int from 0 to `MOST`. A bool does not count as a
    number. `path` is the file of the record, for the message. `cure` is the end of the message and says what the user
    can do.
    """
    for name, kind in kinds.items():
        value = record.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{path}: the entry {name} is missing or of the wrong type ({value!r:.60}); {cure}")
        if kind is int and is_number and value < 0:
            raise UserError(f"{path}: {name} is {value}, which is negative; {cure}")
        if kind is int and is_number and value > MOST:
            raise UserError(f"{path}: {name} is too large ({value!s:.60}); {cure}")


@contextmanager
def restoring(
    path: str | Path, cure: str, unless: Callable[[BaseException], bool] = lambda error: False
) -> Generator[None]:
    """Turn an error inside the `with` block, such as KeyError, into a `UserError` about the file `path`.

    The block uses the file's content, which may be wrong: a list instead of an object, a string instead of a number, a
    missing key. Libraries then raise errors of many types. Errors with another cause than the content pass unchanged:
    `UserError`, OSError, torch's out-of-memory error, and each error for which `unless(error)` is true. `cure` is the
    end of the `UserError`'s message and says what the user can do.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if type(error).__name__ in OF_THE_MACHINE or unless(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} does not have the content that a run stores there ({reason:.120}); {cure}") from error
