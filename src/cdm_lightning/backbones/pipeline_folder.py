"""Find a diffusers pipeline on disk or on the Hugging Face hub, and check it.

The file model_index.json of a pipeline folder names the class of the pipeline and of each part. A part, such as "vae",
lies in a subfolder of the same name. The functions raise `UserError` for a pipeline that cannot be used.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import logging as diffusers_log
from huggingface_hub import snapshot_download
from transformers.utils import logging as transformers_log

from cdm_lightning.backbones.settings_file import read_settings
from cdm_lightning.backbones.whole_folder import AGAIN, INDEX, parts_of, require_settings
from cdm_lightning.errors import Preempted, UserError
from cdm_lightning.files import first_line, irregular, open_regular, require_name

LIBRARIES = ("diffusers", "transformers")  # the libraries whose classes can be parts of a pipeline
TWIN = re.compile(r"\.fp16[.-]|\.bf16\.")  # in the names of half-precision copies of weights
SAFETY_CHECKER = [
    "stable_diffusion",
    "StableDiffusionSafetyChecker",
]  # a class of diffusers with a library name of its own
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate_pipeline(
    pretrained: str, revision: str | None, family: type[DiffusionPipeline], parts: Sequence[str]
) -> Path:
    """Return the local folder of a pipeline. `pretrained` is a folder, or a hub id, which is downloaded at `revision`.

    Raises `UserError` unless `pretrained` is a pipeline of the class `family` that has all `parts`.
    """
    folder = locate_index(
        pretrained, revision
    )  # the index first, so that a wrong family is refused before gigabytes are downloaded
    check_index(folder, pretrained, family, parts)
    if not Path(pretrained).expanduser().is_dir():
        with downloading(pretrained):
            folder = Path(family.download(pretrained, revision=revision))
    require_settings(folder, parts_of(read_index(folder, pretrained)))
    return folder


def pipeline_class_name(pretrained: str, revision: str | None) -> str | None:
    """Return the name of the pipeline class of a folder or hub id, or None if its model_index.json names no class.

    Raises `UserError` if there is no model_index.json.
    """
    return read_index(locate_index(pretrained, revision), pretrained).get("_class_name")


def locate_index(pretrained: str, revision: str | None) -> Path:
    """Return the folder that contains the file model_index.json of a pipeline.

    `pretrained` is this folder, or a hub id at `revision`. For a hub id, only model_index.json is downloaded, to the
    hub's cache. Raises `UserError` if `pretrained` is neither a folder nor a hub id that can be downloaded.
    """
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        require_plain(folder, pretrained)
        return folder
    if folder.exists():
        raise UserError(f"{pretrained} is a file, not a pipeline folder; pass the folder that contains {INDEX}")
    if not HUB_ID.fullmatch(pretrained):
        raise UserError(f"the folder {pretrained} does not exist; pass a pipeline folder or a hub id (owner/name)")
    with downloading(pretrained):
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=[INDEX]))


@contextmanager
def downloading(hub_id: str) -> Generator[None]:
    """Raise a `UserError` that names `hub_id` if a download from the hub inside the `with` block fails."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hub_id} is not a local folder and cannot be downloaded from the Hugging Face hub ({first_line(error)});"
            " without a network, copy the pipeline to this machine and pass its folder: backbone.pretrained=FOLDER"
        ) from error


def read_index(folder: Path, name: str) -> dict[str, Any]:
    """Return the contents of model_index.json in `folder`. `name` is the folder's name in messages.

    Raises `UserError` if the file is missing or broken.
    """
    if not (folder / INDEX).exists():
        raise UserError(
            f"{name} is not a diffusers pipeline, because it has no {INDEX}; pass the pipeline's top folder"
        )
    index = read_settings(folder / INDEX, f"{name}/{INDEX}")
    if not isinstance(index.get("_class_name", ""), str):
        raise UserError(f"{name}/{INDEX}: _class_name must be a string, not {index['_class_name']!r:.80}; {AGAIN}")
    for part, entry in index.items():
        check_entry(part, entry, f"{name}/{INDEX}")
    return index


def check_entry(part: str, entry: Any, where: str) -> None:
    """Raise `UserError` if an entry of model_index.json is not safe to load. The message begins with `where`.

    `part` is the entry's name and `entry` its value. The value is a setting or, for a part of the pipeline, a list
    [library, class] that names the part's class in diffusers or transformers. [null, null] means that the pipeline has
    no such part. The name of a part must be a plain folder name, because the part is read from the folder of this name
    and, in an export, written to it.
    """
    if part.startswith("_") or not isinstance(entry, list):
        return
    require_name(part, f"{where}: the name of a part")
    if entry in ([None, None], SAFETY_CHECKER):
        return
    if len(entry) != 2 or not all(isinstance(name, str) and name.isidentifier() for name in entry):
        raise UserError(
            f"{where}: the entry {part} must be [library, class], not {entry!s:.80}; copy the pipeline again"
        )
    library, found = entry[0], getattr(diffusers, entry[1], None) if entry[0] == "diffusers" else None
    is_part = isinstance(found, type) and issubclass(found, ConfigMixin) and not issubclass(found, DiffusionPipeline)
    if library not in LIBRARIES or (library == "diffusers" and not is_part):
        raise UserError(
            f"{where}: the class of {part}, {'.'.join(entry)}, cannot be loaded; use a pipeline whose parts are classes of "
            "diffusers and transformers"
        )


def require_plain(folder: Path, name: str) -> None:
    """Raise `UserError` if `folder` contains a path that is neither file nor folder, or a link that leaves `folder`.

    For example, reading a named pipe would never end. An export would copy the file outside `folder` that a link leads
    to. Files and folders directly in `folder` are not checked if their names begin with a dot. `name` is the folder's
    name in the message.
    """
    parts = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in (path for part in parts for path in ((part,) if not part.is_dir() else irregular(part))):
        if not path.is_file():
            raise UserError(
                f"{name}: {path.relative_to(folder)} is not a regular file; remove it or copy the pipeline again"
            )
    for part in parts:
        require_own_files(part, folder, name)


def require_own_files(part: Path, folder: Path, name: str) -> None:
    """Raise `UserError` if `part` is or contains a link that leaves the pipeline folder `folder`.

    `part` is a file or subfolder in `folder`. A link may lead to a file in `folder`, and `part` itself may be a link to
    another part in `folder`. If `folder` is a snapshot in the hub's cache, a link may also lead to a file in the folder
    "blobs" of this cache. `name` is the pipeline folder's name in the message.
    """
    whole = folder.resolve()
    blobs = whole.parent.parent / "blobs" if whole.parent.name == "snapshots" else None
    for path in (part, *(part.rglob("*") if part.is_dir() else ())):
        if not path.is_symlink():
            continue
        target = path.resolve()
        is_blob = target.is_file() and target.parent == blobs
        is_part = path.parent == folder and target.parent == whole  # a link to a folder further up would have no end
        if not (is_blob or is_part or (target.is_file() and target.is_relative_to(whole))):
            raise UserError(
                f"{name}: {path.relative_to(folder)} is a link that leaves the folder; replace it by a copy of "
                "the file that it points to"
            )


def check_index(folder: Path, name: str, family: type[DiffusionPipeline], parts: Sequence[str]) -> None:
    """Raise `UserError` unless model_index.json in `folder` names the pipeline class `family` and all `parts`.

    `name` is the folder's name in the message.
    """
    index = read_index(folder, name)
    found = index.get("_class_name")
    if found != family.__name__:
        raise UserError(
            f"{name} is a {found}, but this backbone needs a {family.__name__}; choose the backbone of its family"
        )
    wrong = [part for part in parts if part in index and not isinstance(index[part], list)]
    if wrong:
        raise UserError(f"{name}/{INDEX}: {wrong[0]} must be [library, class], not {index[wrong[0]]!r}; {AGAIN}")
    absent = [part for part in parts if part not in parts_of(index)]
    if absent:
        raise UserError(f"{name} has no {', '.join(absent)}; pass a complete {family.__name__}")


def hash_part(folder: Path) -> str:
    """Return a hash of the names and contents of all files in a part's folder.

    Half-precision copies of weights (.fp16, .bf16) are not hashed. Hashing takes one to two seconds per gigabyte. Raises
    `UserError` if the folder has no files.
    """
    twin = re.compile(r"\.(fp16|bf16)[.-]")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not twin.search(path.name))
    if not files:
        raise UserError(f"{folder} has no files; copy the pipeline again")
    whole = hashlib.blake2b(digest_size=8)
    for path in files:
        with open_regular(path) as file:
            content = hashlib.file_digest(file, hashlib.blake2b).digest()
        whole.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
    return whole.hexdigest()


def copy_parts(source: Path, target: Path, without: Sequence[str]) -> None:
    """Copy model_index.json and all parts except those in `without` from the pipeline folder `source` to `target`.

    Half-precision copies of weights (.fp16, .bf16) are left out. Raises `UserError` for a link that leaves `source`.
    """
    for file in files_to_copy(source, without):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)  # not its mode: a read-only source must not make a read-only copy


def files_to_copy(source: Path, without: Sequence[str]) -> list[Path]:
    """Return the files that `copy_parts` copies from `source`. Raises `UserError` for a link that leaves `source`."""
    parts = [name for name in parts_of(read_index(source, str(source))) if name not in without]
    for part in (INDEX, *parts):
        require_own_files(source / part, source, str(source))
    found = [path for part in parts for path in sorted((source / part).rglob("*")) if path.is_file()]
    return [source / INDEX, *(path for path in found if not TWIN.search(path.name))]


@contextmanager
def loading(what: Path) -> Generator[None]:
    """Turn any error inside the `with` block into a `UserError` that names `what`, the file or folder that is loaded.

    Weights are loaded onto the CPU, even if torch's default device is another one. Progress bars are shown only for downloads.
    """
    with (
        blaming(
            lambda reason: (
                f"{what} cannot be loaded ({reason}); copy the pipeline again, because its files are incomplete"
            )
        ),
        torch.device("cpu"),
        without_bars(diffusers_log),
        without_bars(transformers_log),
    ):
        yield


@contextmanager
def blaming(message: Callable[[str], str]) -> Generator[None]:
    """Turn any exception inside the `with` block into a `UserError` with the text `message(first line of the exception)`.

    All types of exceptions are caught, because libraries raise many undocumented types for broken files. Use this
    function only around code that reads files, so that a programming error is not reported as a broken file.
    `UserError`, `Preempted` and torch's out-of-memory error pass unchanged.
    """
    try:
        yield
    except (UserError, Preempted, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(message(first_line(error))) from error


def codec_class(folder: Path, part: str = "vae") -> type[Any]:
    """Return the diffusers class that model_index.json in the pipeline folder `folder` names for `part`.

    Raises `UserError` if the class is not an image codec.
    """
    name = parts_of(read_index(folder, str(folder))).get(part)
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin) and hasattr(found, "decode")):
        raise UserError(f"{folder / INDEX}: the class of {part}, {name}, is not an image codec of diffusers; {AGAIN}")
    return found


def require_buildable(network: type[Any], config: Mapping[str, Any], file: Path) -> None:
    """Raise `UserError` if a model of the diffusers class `network` cannot be built from `config`.

    The model is built on the meta device, without memory for its weights. `config` was read from `file`, which the
    message names.
    """
    with loading(file), torch.device("meta"):
        network.from_config(dict(config))


@contextmanager
def without_bars(log: ModuleType) -> Generator[None]:
    """Switch off a library's progress bars inside the `with` block. `log` is the library's logging module."""
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()
