"""A check at the start of a run that the folders it will write, now or at its end, can be written."""

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from cdm_lightning.config.arguments import alternatives, annotations_of
from cdm_lightning.config.origin import where_set
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import PathKind

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)  # what may be over by the time of the first save


def require_writable_folders(config: DictConfig) -> None:
    """Raise `UserError`, which names the option, for a folder of `folders_to_write` that cannot be written.

    For each a temporary file is made, and deleted again, in the folder or in the nearest folder above it that exists. The
    folders themselves are not made. A full disk is no error here, since there may be room by the time of the first save.
    """
    tried: set[Path] = set()
    for key, folder in folders_to_write(config, "", Path(config.output_dir)):
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
    """Yield (dotted name, folder) of each option below `node` whose parameter is annotated as a folder that a run writes.

    `key` is the dotted name of `node`, and `run` the run's folder, in which an option such as `FolderOfRun` names a folder.
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
