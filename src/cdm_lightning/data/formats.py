"""Opening prompt files as what they are: the ending of a file's name says its format, and unknown formats are refused."""

import json
import mimetypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from cdm_lightning.data.columns import open_columns, parquet_texts
from cdm_lightning.data.lines import LineFiles, opened
from cdm_lightning.data.selection import TextSource, flaw_of
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

FIELD = "prompt"  # the default field of files that hold more than texts
TEXT, OBJECTS, PARQUET, LIST = "text", "JSON lines", "parquet", "JSON list"
KINDS = {
    ".txt": TEXT,
    ".jsonl": OBJECTS,
    ".ndjson": OBJECTS,
    ".parquet": PARQUET,
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": LIST,
}
IN_FOLDERS = (".txt", ".jsonl", ".ndjson", ".parquet")  # before other files, which may describe these
REFUSED = (".arrow", ".feather", ".npy", ".pt", ".pkl", ".toml", ".xlsx", ".yaml", ".yml")  # unknown to `mimetypes`
LARGEST_LIST = 1 << 30  # bytes of a file that must be read at once
KNOWN_TYPES = mimetypes.MimeTypes(())  # Python's own list: the system's would make the result depend on the machine


def open_files(path: Path, field: str | None, cache_folder: str | Path | None) -> TextSource:
    """Open the texts of a file or folder by its files' endings; raise `UserError` for mixed kinds or a text file with a `field`."""
    files = files_in(path) if path.is_dir() else [path]
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1:
        endings = " and ".join(sorted({file.suffix for file in files}))
        raise UserError(f"{path}: holds {endings} files; a folder must hold one kind: use data=mixed")
    (kind,) = kinds
    if kind == TEXT:
        if field is not None:
            raise UserError(
                f"{path}: `field: {field}` needs a .jsonl or .parquet file; a text file holds one prompt on each line"
            )
        for file in files:
            require_no_objects(file)
        return LineFiles(files)
    if kind == OBJECTS or (kind == LIST and all(map(holds_lines, files))):
        return LineFiles(files, field or FIELD)
    return open_columns(files, field or FIELD, cache_folder, kind, TABLES[kind])


def kind_of(file: Path) -> str:
    """Return the kind of a file's contents by its ending; `UserError` for an ending of another known format.

    A file with no ending, or with one that no format claims, is text.
    """
    ending = file.suffix.lower()
    if ending in KINDS:
        return KINDS[ending]
    known, packed = KNOWN_TYPES.guess_type(file.name)
    if packed or ending in REFUSED or (known and known != "text/plain"):
        raise UserError(
            f"{file}: {ending} files cannot be read as prompts; convert it to one of {', '.join(KINDS)}, or unpack it"
        )
    return TEXT


def files_in(folder: Path) -> list[Path]:
    """Return the prompt files in a folder and its subfolders, sorted by name; raise `UserError` if there are none."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"{folder}: this is a saved Hugging Face data set; use data=dataset data.train.dataset={folder}"
        )
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS and file.is_file())
    files = [file for file in found if file.suffix.lower() in IN_FOLDERS] or found
    if not files:
        raise UserError(f"{folder}: the folder holds no {', '.join(KINDS)} file")
    return files


def require_no_objects(file: Path) -> None:
    """Raise `UserError` for a text file whose first line is a JSON object: its prompts would be objects with their braces."""
    try:
        with opened(file) as lines:
            first = lines.readline(1 << 16)
        found = json.loads(first) if first.lstrip("\ufeff ").startswith("{") else None
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(found, dict):
        raise UserError(f"{file}: holds a JSON object on each line; rename it to *.jsonl")


def holds_lines(file: Path) -> bool:
    """Return whether a *.json file holds an object on each line, as many data sets have it, instead of one list."""
    try:
        with opened(file) as text:
            return text.read(1 << 16).lstrip("\ufeff \t\r\n").startswith("{")
    except OSError as error:
        raise UserError(f"{file}: cannot read the prompt file ({error.strerror})") from error


def delimited_texts(delimiter: str) -> Callable[[Sequence[Path], str, ModuleType], Iterator[list[str | None]]]:
    """Return a function that yields the texts of the column `field` of files with this delimiter and a head line."""

    def texts(paths: Sequence[Path], field: str, pyarrow: ModuleType) -> Iterator[list[str | None]]:
        from pyarrow import csv

        for path in paths:
            try:
                with csv.open_csv(
                    path,
                    parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                    convert_options=csv.ConvertOptions(column_types={field: pyarrow.string()}),
                ) as table:
                    if field not in table.schema.names:
                        raise UserError(
                            f"{path}: no column {field!r}, it has {', '.join(table.schema.names)}; set field=NAME"
                        )
                    for batch in table:
                        yield batch.column(table.schema.names.index(field)).to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as a table ({first_line(error)}); correct the file") from error

    return texts


def listed_texts(paths: Sequence[Path], field: str, pyarrow: ModuleType) -> Iterator[list[str | None]]:
    """Yield the texts of files that hold a JSON list each, of texts or of objects with a text under `field`."""
    for path in paths:
        if path.stat().st_size > LARGEST_LIST:
            raise UserError(f"{path}: a JSON list is read at once, and this is over 1 GB; write it as *.jsonl")
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({first_line(error)}); correct the file") from error
        if not isinstance(found, list):
            raise UserError(f'{path}: must hold a list of prompts, or of objects with a text under "{field}"')
        texts = [entry.get(field) if isinstance(entry, dict) else entry for entry in found]
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise UserError(f'{path}, entry {number}: neither a text nor an object with a text in "{field}"')
            if flaw := flaw_of(text):
                raise UserError(f"{path}, entry {number}: {flaw}")
        yield texts


TABLES = {
    PARQUET: parquet_texts,
    "csv": delimited_texts(","),
    "tsv": delimited_texts("\t"),
    LIST: listed_texts,
}
