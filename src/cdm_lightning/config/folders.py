"""Check at the start of a run that all folders to which it will write are writable."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from cdm_lightning.config.arguments import alternatives, annotations_of
from cdm_lightning.config.origin import where_set
from cdm_lightning.errors import UserError
from cdm_lightning.files import PASSING
from cdm_lightning.kinds import PathKind


def require_writable_folders(config: DictConfig) -> None:
    """Raise `UserError` for the first folder in the configuration that the run cannot write to.

    `folders_to_write` finds the folders in the configuration. A temporary file is written into each folder, or into the
    nearest existing folder above it, and deleted again. The folders themselves are not created. A full disk is not an
    error here, because there may be space again when the run saves.
    """
    tried: set[Path] = set()
    for key, folder in folders_to_write(config, "", Path(str(config.output_dir))):
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        if place in tried:
            continue
        tried.add(place)
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            if error.errno not in PASSING:
                why = error.strerror or error
                raise UserError(
                    f"{key}={folder} cannot be written ({place}: {why}); set another folder{where_set(key)}"
                ) from error


def folders_to_write(node: Any, key: str, run: Path) -> Iterator[tuple[str, Path]]:
    """Yield (option, folder) for each option that names a folder to which a run writes.

    These are the options whose parameters have the annotation `FolderToWrite` or `FolderOfRun`. Only options in `node`
    are searched; `key` is the dotted name of `node`. A `FolderOfRun` is relative to `run`, the run's folder.
    """
    if not isinstance(node, DictConfig):
        return
    annotated = annotations_of(node.get("_target_"))
    for name in (str(name) for name in node if not OmegaConf.is_missing(node, name)):
        where = f"{key}.{name}".lstrip(".")
        marks = [mark for kind in alternatives(annotated.get(name, Any)) for mark in _marks(kind)]
        written = [mark for mark in marks if mark.written]
        value = node[name]
        if written and isinstance(value, str | int | float):
            yield where, run / str(value) if written[0].inside else Path(str(value))
        yield from folders_to_write(value, where, run)


def _marks(kind: Any) -> list[PathKind]:
    return [mark for mark in get_args(kind)[1:] if isinstance(mark, PathKind)] if get_origin(kind) is Annotated else []
