"""Finding a diffusers pipeline on disk or on the Hugging Face hub, with a one-line error if it cannot be used.

The index of a pipeline folder is its model_index.json, which names the pipeline's class and the class of each part; a part,
such as "vae", is in the subfolder of its name.
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

LIBRARIES = ("diffusers", "transformers")  # what the parts of a pipeline come from
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate_pipeline(
    pretrained: str, revision: str | None, family: type[DiffusionPipeline], parts: Sequence[str]
) -> Path:
    """Return the local folder of `pretrained`, a folder or a hub id, which is downloaded (at `revision`).

    UserError unless it is a pipeline of the class `family` that has all `parts`.
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
    """Return the name of the pipeline class of a folder or hub id (None if its index has none); UserError without an index."""
    return read_index(locate_index(pretrained, revision), pretrained).get("_class_name")


def locate_index(pretrained: str, revision: str | None) -> Path:
    """Return the local folder `pretrained`; for a hub id, download only the index and return the folder in the hub's cache.

    UserError if `pretrained` is neither a folder nor a hub id that can be downloaded.
    """
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        require_plain(folder, pretrained)
        return folder
    if folder.exists():
        raise UserError(f"{pretrained} is a file, not a pipeline folder; pass the folder that holds {INDEX}")
    if not HUB_ID.fullmatch(pretrained):
        raise UserError(f"the folder {pretrained} does not exist; pass a pipeline folder or a hub id (owner/name)")
    with downloading(pretrained):
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=[INDEX]))


@contextmanager
def downloading(hub_id: str) -> Generator[None]:
    """Turn an error of a download from the hub inside the `with` into a UserError that names `hub_id`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hub_id} is not a local folder and cannot be downloaded from the Hugging Face hub ({first_line(error)});"
            " without a network, copy the pipeline to this machine and pass its folder: backbone.pretrained=FOLDER"
        ) from error


def read_index(folder: Path, name: str) -> dict[str, Any]:
    """Return the contents of the index in `folder`; UserError, which calls the folder `name`, if it is missing or broken."""
    if not (folder / INDEX).exists():
        raise UserError(f"{name} is not a diffusers pipeline: it has no {INDEX}; pass the pipeline's top folder")
    index = read_settings(folder / INDEX, f"{name}/{INDEX}")
    for part, entry in index.items():
        check_entry(part, entry, f"{name}/{INDEX}")
    return index


def check_entry(part: str, entry: Any, where: str) -> None:
    """Raise UserError unless an entry of an index is a setting, or a part that is safe to load. Messages begin with `where`.

    A part is [library, class] with a class of diffusers or transformers; both are null for a part that is left out. Its name
    must be a plain folder name: files are read from and copied to the folder of this name.
    """
    if part.startswith("_") or not isinstance(entry, list):
        return
    require_name(part, f"{where}: the name of a part")
    if entry == [None, None]:
        return
    if len(entry) != 2 or not all(isinstance(name, str) and name.isidentifier() for name in entry):
        raise UserError(f"{where}: {part} must be [library, class], got {entry!s:.80}; copy the pipeline again")
    library, found = entry[0], getattr(diffusers, entry[1], None) if entry[0] == "diffusers" else None
    is_part = isinstance(found, type) and issubclass(found, ConfigMixin) and not issubclass(found, DiffusionPipeline)
    if library not in LIBRARIES or (library == "diffusers" and not is_part):
        raise UserError(
            f"{where}: {part} is of {'.'.join(entry)}, which is no part of a pipeline; only parts of diffusers and "
            "transformers are loaded, and no code from a folder"
        )


def require_plain(folder: Path, name: str) -> None:
    """Raise UserError, which calls the folder `name`, if it holds anything but files and folders: a pipe would be read for ever."""
    parts = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in (path for part in parts for path in ((part,) if not part.is_dir() else irregular(part))):
        if not path.is_file():
            raise UserError(
                f"{name}: {path.relative_to(folder)} is no regular file; remove it or copy the pipeline again"
            )


def check_index(folder: Path, name: str, family: type[DiffusionPipeline], parts: Sequence[str]) -> None:
    """Raise UserError, which calls the folder `name`, unless its index has the class `family` and all `parts`."""
    index = read_index(folder, name)
    found = index.get("_class_name")
    if found != family.__name__:
        raise UserError(f"{name} holds a {found}, not a {family.__name__}; choose the backbone of its family")
    wrong = [part for part in parts if part in index and not isinstance(index[part], list)]
    if wrong:
        raise UserError(f"{name}/{INDEX}: {wrong[0]} must be [library, class], not {index[wrong[0]]!r}; {AGAIN}")
    absent = [part for part in parts if part not in parts_of(index)]
    if absent:
        raise UserError(f"{name} lacks {', '.join(absent)}; pass a complete {family.__name__}")


def hash_part(folder: Path) -> str:
    """Return a hash of the names and contents of all files in a part's folder; UserError if it has none.

    Copies of weights in half precision (.fp16, .bf16) do not count. Hashing takes one to two seconds per gigabyte.
    """
    twin = re.compile(r"\.(fp16|bf16)[.-]")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not twin.search(path.name))
    if not files:
        raise UserError(f"{folder} holds no files; copy the pipeline again")
    whole = hashlib.blake2b(digest_size=8)
    for path in files:
        with open_regular(path) as file:
            content = hashlib.file_digest(file, hashlib.blake2b).digest()
        whole.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
    return whole.hexdigest()


def copy_parts(source: Path, target: Path, without: Sequence[str]) -> None:
    """Copy a pipeline folder's index and the parts that it names to `target`, but not the parts `without`.

    Half-precision copies of weights (.fp16, .bf16) are left out.
    """
    parts = [name for name in parts_of(read_index(source, str(source))) if name not in without]
    shutil.copyfile(source / INDEX, target / INDEX)
    for part in parts:
        # copyfile: a read-only source, such as an installed package, must not make a read-only copy
        twins = shutil.ignore_patterns("*.fp16.*", "*.fp16-*", "*.bf16.*")
        shutil.copytree(source / part, target / part, ignore=twins, copy_function=shutil.copyfile)


@contextmanager
def loading(what: Path) -> Generator[None]:
    """Turn any error of loading the files `what` inside the `with` into a UserError that names them.

    Weights are loaded onto the CPU whatever torch's default device is, and without the progress bars of diffusers and
    transformers, except those of downloads.
    """
    with (
        blaming(lambda reason: f"cannot load {what} ({reason}); its files are incomplete: copy them again"),
        torch.device("cpu"),
        without_bars(diffusers_log),
        without_bars(transformers_log),
    ):
        yield


@contextmanager
def blaming(message: Callable[[str], str]) -> Generator[None]:
    """Turn whatever a library raises inside the `with` into UserError(message(first line of its error)).

    It is for reading files only: what libraries raise for bad ones is of every type and not documented. UserError, Preempted
    and torch's out-of-memory error pass unchanged.
    """
    try:
        yield
    except (UserError, Preempted, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(message(first_line(error))) from error


def codec_class(folder: Path, part: str = "vae") -> type[Any]:
    """Return the diffusers class that the index names for `part`; UserError if it is not an image codec."""
    name = parts_of(read_index(folder, str(folder))).get(part)
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin) and hasattr(found, "decode")):
        raise UserError(f"{folder / INDEX} names {name} as its {part}, which is no image codec of diffusers; {AGAIN}")
    return found


def require_buildable(network: type[Any], config: Mapping[str, Any], file: Path) -> None:
    """Raise UserError, which names `file`, unless the diffusers model `network` can be built from `config` (on meta)."""
    with loading(file), torch.device("meta"):
        network.from_config(dict(config))


@contextmanager
def without_bars(log: ModuleType) -> Generator[None]:
    """Switch off a library's progress bars inside the `with`; `log` is its logging module."""
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()
