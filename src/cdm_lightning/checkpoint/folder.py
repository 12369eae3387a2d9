"""A checkpoint as a folder on disk, which is either complete or does not exist.

`checkpoints/iteration_0000500/` is first written under a name that begins with a dot. When all its files are on the
disk, `COMPLETE.json` is written with the size and checksum of each file, and the folder is renamed to its final name.
If the process or the machine is killed before that, only the folder with the dot remains, and the run deletes it when
it is started again.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from cdm_lightning.errors import UserError
from cdm_lightning.files import open_regular, read_text, sync
from cdm_lightning.files.records import WRONG_CONTENT

NAME = "iteration_{:07d}"
PATTERN = re.compile(r"iteration_(\d{7,})")
OLD_FILE = re.compile(r"iteration_\d{7,}\.ckpt")  # names of checkpoints of older versions, which were single files
MARKER = "COMPLETE.json"
SAVING, REMOVING, UNUSED = ".saving_", ".removing_", "unused_"
TEMPORARY = re.compile(rf"({re.escape(SAVING)}|{re.escape(REMOVING)}){PATTERN.pattern}")
CHUNK = 1 << 24  # bytes read at a time

FileSums = dict[str, dict[str, int]]  # file name: {"bytes": size, "crc32": checksum}


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, ordered by iteration, without verifying them.

    The list is empty if `folder` does not exist.
    """
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def iteration_of(path: Path) -> int:
    """Return the iteration in a checkpoint folder's name."""
    return int(cast(re.Match[str], PATTERN.fullmatch(path.name))[1])


def refuse_old_files(folder: Path) -> None:
    """Raise `UserError` if the folder holds checkpoints of an older version of this package.

    Old versions wrote each checkpoint as a single file, which this version cannot read.
    """
    if folder.is_dir() and (old := [path.name for path in folder.iterdir() if OLD_FILE.fullmatch(path.name)]):
        raise UserError(f"{folder}: {old[0]} is from an older version and cannot be read; set another run_name")


def begin(folder: Path, iteration: int) -> Path:
    """Make an empty temporary folder in `folder` for the checkpoint of `iteration`, and return its path.

    `commit` makes it the finished checkpoint. Raises OSError if the temporary folder cannot be made.
    """
    temporary = temporary_path(folder, iteration)
    _delete(temporary)
    temporary.mkdir(parents=True)
    return temporary


def temporary_path(folder: Path, iteration: int) -> Path:
    """Return the path of the temporary folder for the checkpoint of `iteration`."""
    return folder / (SAVING + NAME.format(iteration))


def commit(temporary: Path, sums: FileSums) -> Path:
    """Complete a checkpoint: write COMPLETE.json into the folder `temporary`, and give this folder its final name.

    `sums` holds the size and checksum of each file of the checkpoint. An earlier checkpoint of the same iteration is
    replaced. Returns the new path.
    """
    write_synced(temporary / MARKER, json.dumps({"files": sums}, indent=1).encode())
    sync(temporary)
    target = temporary.with_name(temporary.name.removeprefix(SAVING))
    if target.exists():
        remove(target)
    os.rename(temporary, target)
    sync(target.parent)
    return target


def write_synced(path: Path, content: bytes) -> dict[str, int]:
    """Write `content` to a file and wait until it is on the disk. Return {"bytes": size, "crc32": checksum}."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def remove(path: Path) -> None:
    """Delete a checkpoint. It gets a temporary name first, so that a half-deleted folder is never read as a checkpoint."""
    doomed = path.with_name(REMOVING + path.name)
    _delete(doomed)
    os.rename(path, doomed)
    _delete(doomed)


def sweep(folder: Path) -> list[str]:
    """Delete the temporary folders of interrupted saves and deletions in `folder`, and return their names."""
    if not folder.is_dir():
        return []
    left = [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)]  # other names belong to somebody else
    for path in left:
        _delete(path)
    return sorted(path.name for path in left)


def _delete(path: Path) -> None:
    """Delete the folder, file or link at `path`. Errors are ignored, so parts of a folder may be left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def set_aside(path: Path) -> Path:
    """Rename a checkpoint folder NAME to unused_NAME, so that no run finds it any more. Return the new path."""
    target = path.with_name(UNUSED + path.name)
    _delete(target)
    os.rename(path, target)
    return target


def rename(path: Path, target: Path) -> None:
    """Rename a checkpoint, and wait until the change is on the disk."""
    os.rename(path, target)
    sync(target.parent)


def read_marker(path: Path) -> Mapping[str, dict[str, int]]:
    """Return {file name: {"bytes": size, "crc32": checksum}} from a checkpoint's COMPLETE.json.

    Raises `UserError` if the file cannot be read, or does not exist because the checkpoint was never finished.
    """
    try:
        files = json.loads(read_text(path / MARKER, follow=False))["files"]
        return {str(name): {"bytes": int(of["bytes"]), "crc32": int(of["crc32"])} for name, of in files.items()}
    except FileNotFoundError as error:
        if (path / "checkpoints").is_dir():
            raise UserError(
                f"{path} is the folder of a run, not a checkpoint; pass one of the checkpoints in {path / 'checkpoints'}"
            ) from error
        raise UserError(
            f"{path}: this is an unfinished checkpoint, without {MARKER}; use another checkpoint"
        ) from error
    except (OSError, *WRONG_CONTENT) as error:
        raise UserError(
            f"{path}: {MARKER} cannot be read ({type(error).__name__}: {error!s:.120}); use another checkpoint"
        ) from error


def find_fault(path: Path, sums: Mapping[str, dict[str, int]], names: Iterable[str]) -> str | None:
    """Return a description of the first missing, truncated or damaged file of a checkpoint, or None if all are good.

    Only the files `names` in the folder `path` are checked. `sums` holds their sizes and checksums, as `read_marker`
    returns them.
    """
    for name in names:
        file = path / name
        if "/" in name or not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != sums[name]["bytes"]:
            return f"{name} is truncated: {size} of {sums[name]['bytes']} bytes"
        if checksum(file) != sums[name]["crc32"]:
            return f"{name} is damaged: its checksum is wrong"
    return None


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file's content."""
    found = 0
    with open_regular(file) as stream:
        while chunk := stream.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found
