"""Opening prompt files by format, which the ending of a file's name says; formats that hold no prompts are refused."""

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
    """Open the texts of a file, or of a folder's files, by the endings of their names.

    `field` is the key or column of the prompts (None: "prompt"); columns and lists are copied into `cache_folder`. Raises
    `UserError` for a folder with several formats, an unknown format, or a `field` with text files, which have no fields.
    """
    files = files_in(path) if path.is_dir() else [path]
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1:
        endings = " and ".join(sorted({file.suffix for file in files}))
        raise UserError(
            f"{path}: holds {endings} files; a folder must hold one kind: pass one file, or mix them with data=mixed"
        )
    (kind,) = kinds
    if kind == TEXT:
        if field is not None:
            raise UserError(
                f"{path}: `field: {field}` needs a .jsonl or .parquet file; for a text file, one prompt on each line, leave it out"
            )
        for file in files:
            require_no_objects(file)
        return LineFiles(files)
    if kind == OBJECTS or (kind == LIST and all(map(holds_lines, files))):
        return LineFiles(files, field or FIELD)
    return open_columns(files, field or FIELD, cache_folder, kind, TABLES[kind])


def kind_of(file: Path) -> str:
    """Return a file's format by the ending of its name, one of the values of `KINDS`.

    A file with no ending, or with one of no known format, is plain text. `UserError` for an ending such as .yaml or .gz,
    whose format is known but cannot be read as prompts.
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
    """Return the prompt files in a folder and its subfolders, sorted by path.

    If there are any .txt, .jsonl, .ndjson or .parquet files, others (.csv, .tsv, .json) are ignored, since those may only
    describe them. `UserError` if there are no prompt files, and for a folder that `datasets` saved.
    """
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"{folder}: this is a saved Hugging Face data set; use data=dataset data.train.dataset={folder}"
        )
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS and file.is_file())
    files = [file for file in found if file.suffix.lower() in IN_FOLDERS] or found
    if not files:
        raise UserError(f"{folder}: the folder holds no {', '.join(KINDS)} file; pass a file or folder of prompts")
    return files


def require_no_objects(file: Path) -> None:
    """Raise `UserError` if the first line of a text file is a JSON object: the file is JSON lines with the wrong ending."""
    try:
        with opened(file) as lines:
            first = lines.readline(1 << 16)
        found = json.loads(first) if first.lstrip("\ufeff ").startswith("{") else None
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(found, dict):
        raise UserError(f"{file}: holds a JSON object on each line; rename it to *.jsonl")


def holds_lines(file: Path) -> bool:
    """Return whether a *.json file begins with an object: then it has one on each line, like *.jsonl, and not one list."""
    try:
        with opened(file) as text:
            return text.read(1 << 16).lstrip("\ufeff \t\r\n").startswith("{")
    except OSError as error:
        raise UserError(f"{file}: cannot read the prompt file ({error.strerror})") from error


def delimited_texts(delimiter: str) -> Callable[[Sequence[Path], str, ModuleType], Iterator[list[str | None]]]:
    """Return a reader of delimited files (CSV, TSV) for `open_columns`.

    The reader takes (paths, field, pyarrow) and yields lists of the texts in column `field`, whose name stands in each
    file's first line. It raises `UserError` for a file without this column or that is no table.
    """

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
    """Yield the list of texts of each file, which holds one JSON list: of texts, or of objects with a text under `field`.

    `UserError` for a file over 1 GB, since a list is read at once, and for a file or entry that does not have this form.
    """
    for path in paths:
        if path.stat().st_size > LARGEST_LIST:
            raise UserError(
                f"{path}: over 1 GB, too large for a JSON list, which is read at once; convert it to *.jsonl"
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({first_line(error)}); correct the file") from error
        if not isinstance(found, list):
            raise UserError(f'{path}: must hold a JSON list of prompts, or of objects with a text under "{field}"')
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
