"""Read the words that name a model and its settings, such as "my_student steps=1,2 guidance=1.5 shift=uniform name=a"."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import Guidance, Model, Name, Positive, Steps
from cdm_lightning.kinds.command_line import argument

if TYPE_CHECKING:  # it takes seconds to import: --help and error messages should not wait for it
    from cdm_lightning.evaluation.grid import ModelGrid

LONGEST_NAME = 100
GRID = {"steps": Steps, "guidance": Guidance, "shift": Positive, "name": Name}  # what may follow the folder of --model
RENAMED = {"metrics": "metric", "options": "set"}  # parameters of `evaluate` that the command line calls otherwise
SCHEDULES = {"trained": None, "uniform": 1.0}  # words for values of shift: None is the model's own


def read_model(words: Sequence[str]) -> "ModelGrid":
    """Open a model, and return it with the steps, guidance scales and shifts at which it is measured.

    `words` are the words after the option --model: a folder, file or hub id, and settings such as "steps=1,2,4".
    Raises `UserError` for a setting that cannot be used, and for a model that cannot be opened.
    """
    from cdm_lightning.evaluation.given_images import EXPECTED, ImagesOfPrompts
    from cdm_lightning.evaluation.grid import ModelGrid
    from cdm_lightning.run.models import open_any

    folder, *settings = words
    grid = dict(read_setting(folder, word) for word in settings)
    if len(grid) < len(settings):
        raise UserError(f"--model {folder}: a setting is given twice; separate its values by commas, as in steps=1,2,4")
    try:
        argument(Model)(folder)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--model {error}") from error
    opened = open_any(folder)
    if isinstance(opened, ImagesOfPrompts) and grid.keys() - {"name"}:
        raise UserError(
            f"--model {folder} is a folder of images, which has no {min(grid.keys() - {'name'})}; {EXPECTED}"
        )
    return ModelGrid(folder, lambda: open_any(folder), **grid)


def read_setting(folder: str, word: str) -> tuple[str, Any]:
    """Return the key and the values of a setting `word`: for "steps=1,2,4" they are "steps" and (1, 2, 4).

    The value of the key "name" is one string. `folder` is the model's name for messages. Raises `UserError` if `word`
    has an unknown key or a value that is not allowed.
    """
    key, equals, values = word.partition("=")
    if key not in GRID or not equals:
        raise UserError(
            f"--model {folder}: {word!r} must be one of {', '.join(f'{known}=VALUE' for known in GRID)}; "
            "pass another --model for another folder"
        )
    try:
        found = tuple(_value(key, value) for value in ([values] if key == "name" else values.split(",")))
    except argparse.ArgumentTypeError as error:
        words = f", or {' or '.join(SCHEDULES)}" if key == "shift" else ""
        raise UserError(f"--model {folder}: {key}={values}: {error}{words}") from error
    if key == "name" and (len(values) > LONGEST_NAME or "|" in values or not values.isprintable()):
        raise UserError(
            f"--model {folder}: name={values[:80]!r} must have at most {LONGEST_NAME} printable characters, and no |"
        )
    return key, found[0] if key == "name" else found


def _value(key: str, text: str) -> Any:
    return SCHEDULES[text] if key == "shift" and text in SCHEDULES else argument(GRID[key])(text)


def read_prompts(file: str, count: int) -> list[str]:
    """Return the first `count` prompts of `file`, which is the path of a prompt file or the name of a bundled one.

    Raises `UserError` if the file cannot be read or has no prompts.
    """
    from cdm_lightning.config import asset_path
    from cdm_lightning.data.prompts import PromptFile

    bundled = {path.stem: path for path in Path(asset_path("prompts")).glob("*.txt")}
    is_path = "/" in file or bool(Path(file).suffix) or Path(file).exists()
    if not is_path and file not in bundled:
        raise UserError(f"--prompts {file} is neither a file nor one of the bundled sets {', '.join(sorted(bundled))}")
    found = PromptFile(file if is_path else bundled[file])
    return [found[i] for i in range(min(count, len(found)))]


def command_words(given: Mapping[str, Any]) -> list[str]:
    """Return the words of the command that repeats an evaluation, or [] if it was started with objects of Python.

    `given` maps the parameters of `cdm_lightning.evaluate.evaluate` to their values.
    """
    models, prompts = given["models"], given["prompts"]
    if not isinstance(prompts, str) or any(not isinstance(model, str | Sequence) for model in models):
        return []
    words = ["python", "-m", "cdm_lightning.evaluate", "--prompts", prompts]
    for name, value in given.items():
        option = f"--{RENAMED.get(name, name).replace('_', '-')}"
        if name in ("models", "prompts") or value is None or value is False or value in ((), []):
            continue
        if name == "options":
            words += [word for one in value for word in (option, one)]
        else:
            words += [option, *map(str, value if isinstance(value, list | tuple) else [] if value is True else [value])]
    for model in models:
        words += ["--model", *([model] if isinstance(model, str) else model)]
    return words
