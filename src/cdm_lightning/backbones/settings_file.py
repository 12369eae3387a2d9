"""Reading the JSON files of model folders; a file that cannot be used is a UserError that names it."""

import json
from pathlib import Path
from typing import Any

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, read_text

LARGEST = 1 << 28  # bytes; the largest vocabularies take about 4e7


def read_settings(path: Path, name: str | None = None) -> dict[str, Any]:
    """Return the JSON object in a file; UserError, which calls the file `name` (default: `path`), if it has none."""
    shown = name or path
    try:
        found = json.loads(read_text(path, LARGEST))
    except FileNotFoundError:
        raise UserError(f"{shown} is missing; copy the folder again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{shown} cannot be read ({first_line(error)}); copy the folder again") from error
    if not isinstance(found, dict):
        raise UserError(f"{shown} must hold a JSON object, not a {type(found).__name__}; copy the folder again")
    return found
