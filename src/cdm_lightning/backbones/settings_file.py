"""Read JSON files in model folders. A file that cannot be used raises a `UserError` that names it."""

import json
from pathlib import Path
from typing import Any

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, read_text

LARGEST = 1 << 28  # bytes; the largest vocabularies take about 4e7


def read_settings(path: Path, name: str | None = None) -> dict[str, Any]:
    """Return the JSON object in a file. `name` is the file's name in messages (default: `path`).

    Raises `UserError` if the file is missing, cannot be read or does not contain a JSON object.
    """
    shown = name or path
    try:
        found = json.loads(read_text(path, LARGEST))
    except FileNotFoundError:
        raise UserError(f"the file {shown} does not exist; copy or download the model again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{shown} cannot be read ({first_line(error)}); copy or download the model again") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{shown} must contain a JSON object, not a {type(found).__name__}; copy or download the model again"
        )
    return found
