"""The input files of a run: prompt files, model folders and LoRA files that its configuration names.

The sizes and hashes of the input files are recorded at each start and in each checkpoint. When the run is resumed, the
present sizes and hashes are compared with those in the last checkpoint, because a run with other prompts or another
teacher under the same path would be another run. Modification times are not compared, so a copy of a file counts as the
same file. Large files of weights are hashed only in part (see `content_hash`), so that a start does not read a hundred
gigabytes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cdm_lightning.config import parameters_of
from cdm_lightning.errors import UserError
from cdm_lightning.files import open_regular
from cdm_lightning.run.same import decides

ACCEPT = "accept_changed_inputs"  # the option that accepts changes
WHOLE, WHOLE_TEXT = 1 << 25, 1 << 31  # bytes: files of at most this size are read in full
PIECE, PIECES = 1 << 12, 4096  # bytes of a piece of a larger file, and the number of pieces
BINARY = (".safetensors", ".bin", ".pt", ".arrow", ".parquet", ".gguf", ".msgpack", ".h5", ".onnx")
PICTURES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
)  # not compared: an image set's file of captions is compared instead
MOST_FILES = 10_000  # of one folder that are compared
MOST_HEADER = 1 << 27  # bytes of a safetensors header
THREADS = 8

Inputs = dict[
    str, dict[str, Any]
]  # dotted option: {"path": as configured, "files": {name in the folder: [bytes, hash]}}


def inputs_of(config: Mapping[str, Any], folders: Mapping[str, Path] | None = None) -> Inputs:
    """Return the size and hash of each file that affects a run's weights, grouped by option.

    The result has an entry for each option of `config` that affects the weights and has the path of an existing file or
    folder as its value. The entry is {"path": this path, "files": {name: [size in bytes, hash]}}, with the names of
    `files_of`. A value without "/" counts as a path only if the option is a parameter that takes a path.

    `folders` maps an option to the folder whose files its entry lists, whatever the option's value is. This is needed
    if the value is the hub id of a pipeline: the folder is then the one that contains the downloaded pipeline.
    """
    named = dict(paths_in(config))
    named |= {key: (named[key][0] if key in named else str(path), path) for key, path in (folders or {}).items()}
    wanted = [(key, name, file) for key, (_, path) in named.items() for name, file in files_of(path)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda entry: describe(entry[2]), wanted))
    inputs: Inputs = {key: {"path": text, "files": {}} for key, (text, _) in sorted(named.items())}
    for (key, name, _), of in zip(wanted, found, strict=True):
        inputs[key]["files"][name] = of
    return inputs


def paths_in(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[str, Path]]]:
    """Yield (option, (value, path)) for each option that names an existing file or folder and affects the weights.

    `node` is the configuration or a group of its options. Options are written with dots, as in "data.train.path". For a
    group, `prefix` is the group's name and a dot, as in "data."; for the whole configuration it is "". `path` is
    `value` as a `Path`, in which "~" is replaced by the user's home.
    """
    parameters = parameters_of(node["_target_"]) if isinstance(node.get("_target_"), str) else {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if key == "module" or not decides(key):  # the module's options are copies of other groups
            continue
        if isinstance(value, Mapping):
            yield from paths_in(value, f"{key}.")
            continue
        for number, text in enumerate(value if isinstance(value, list) else [value]):
            takes_path = name in ("pretrained", "path") or (
                name in parameters and "Path" in str(parameters[name].annotation)
            )
            if isinstance(text, str) and text.isprintable() and (takes_path or os.sep in text) and _exists(text):
                path = Path(text).expanduser()
                yield (f"{key}.{number}" if isinstance(value, list) else key), (text, path)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, or the home of an unknown user
        return False


def files_of(path: Path) -> list[tuple[str, Path]]:
    """Return (name, path) for the file `path`, or for each file in the folder `path` and its subfolders.

    The name of a file in the folder is its path relative to the folder. Pictures, hidden files and hidden subfolders of
    the folder are left out. At most `MOST_FILES` files are returned.
    """
    if not path.is_dir():
        return [(path.name, path)] if path.is_file() else []
    found = []
    for folder, names, files in os.walk(path, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            file = Path(folder) / name
            if not name.startswith(".") and file.suffix.lower() not in PICTURES and file.is_file():
                found.append((file.relative_to(path).as_posix(), file))
        if len(found) >= MOST_FILES:
            break
    return found[:MOST_FILES]


def describe(file: Path) -> list[Any]:
    """Return [size in bytes, hash] of a file, or [0, "unreadable"] if it cannot be read.

    No error is raised here, because the code that uses the file reports the reason.
    """
    try:
        return [file.stat().st_size, content_hash(file)]
    except (OSError, ValueError):
        return [0, "unreadable"]


def content_hash(file: Path) -> str:
    """Return a hash of a file's content, or of parts of it if the file is large.

    A file of weights or data (its suffix is in `BINARY`) is large if it has more than 32 MiB. Any other file is large
    if it has more than 2 GiB. Only 4096 evenly spaced pieces of 4 KiB of a large file are hashed. If the large file is
    a safetensors file, its header and a piece in the middle of each tensor are hashed as well, so that a replaced
    tensor is noticed. Raises OSError if the file cannot be read.
    """
    size = file.stat().st_size
    whole = hashlib.blake2b(digest_size=16)
    with open_regular(file) as stream:
        if size <= (WHOLE if file.suffix.lower() in BINARY else WHOLE_TEXT):
            while chunk := stream.read(1 << 22):
                whole.update(chunk)
            return whole.hexdigest()
        places = {number * (size - PIECE) // (PIECES - 1) for number in range(PIECES)}
        if file.suffix == ".safetensors":
            header_size = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(header_size, MOST_HEADER))
            whole.update(header)
            places |= {8 + header_size + begin for begin in _tensor_middles(header)}
        for place in sorted(place for place in places if place < size):
            stream.seek(place)
            whole.update(stream.read(PIECE))
    return whole.hexdigest()


def _tensor_middles(header: bytes) -> Iterator[int]:
    try:
        entries = json.loads(header)
        for entry in entries.values():
            if isinstance(entry, dict) and "data_offsets" in entry:
                begin, end = entry["data_offsets"]
                yield (int(begin) + int(end)) // 2
    except (ValueError, TypeError, AttributeError, RecursionError):
        return


def changes(before: Any, now: Inputs) -> list[str]:
    """Return a description of each file that differs between `before` and `now`, such as "OPTION=PATH: NAME is gone".

    `before` are the input files that a checkpoint records. The checkpoint may be a stranger's, so `before` may have any
    form. `now` are the input files of the present start. Options that only one of the two has are not compared here,
    because `run.same` decides whether an option may be added or removed.
    """
    found = []
    for key, inputs in now.items():
        earlier = before.get(key) if isinstance(before, Mapping) else None
        files = earlier.get("files") if isinstance(earlier, Mapping) else None
        if not isinstance(files, Mapping):
            continue
        where = f"{key}={inputs['path']}"
        here = inputs["files"]
        for name in [*files, *(name for name in here if name not in files)]:
            if name not in here:
                found.append(f"{where}: {name} is gone")
            elif name not in files:
                found.append(f"{where}: {name} is new")
            elif list(files[name]) != list(here[name]):
                sizes = [of[0] if isinstance(of, list) and of else "?" for of in (files[name], here[name])]
                shown = (
                    f"{sizes[0]} bytes, now {sizes[1]}" if sizes[0] != sizes[1] else "other content of the same size"
                )
                found.append(f"{where}: {name} has changed ({shown})")
    return found


def require_same_inputs(before: Any, now: Inputs, folder: Path, accept: bool) -> str | None:
    """Raise `UserError` if the input files of the run in `folder` have changed since its last checkpoint.

    With `accept`, changes raise no error; a description of them is returned. If nothing has changed, None is returned.
    `before` are the input files that the checkpoint records, and `now` are those of the present start.
    """
    found = changes(before, now)
    if not found:
        return None
    text = f"{found[0]}{f', and {len(found) - 1} more files' if len(found) > 1 else ''}"
    if accept:
        return f"continuing with input files that have changed since the last checkpoint: {text}"
    raise UserError(
        f"{folder}: input files have changed since the run's last checkpoint: {text}; restore them, set another "
        f"run_name, or accept the change with {ACCEPT}=true"
    )
