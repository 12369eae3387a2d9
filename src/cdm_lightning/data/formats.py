"""Read the prompts of files. The ending of a file's name decides in which format the file is read."""

import json
import mimetypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from cdm_lightning.data.columns import SEVERAL, open_columns, parquet_texts
from cdm_lightning.data.content import require_closed_quotes, require_plain_text
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
IN_FOLDERS = (".txt", ".jsonl", ".ndjson", ".parquet")  # read from a folder in preference to other files
REFUSED = (".arrow", ".feather", ".npy", ".pt", ".pkl", ".toml", ".xlsx", ".yaml", ".yml")  # unknown to `mimetypes`
LARGEST_LIST = 1 << 30  # bytes of a JSON list, which is read at once
KNOWN_TYPES = mimetypes.MimeTypes(())  # Python's own list: the system's would make the result depend on the machine


def open_files(path: Path, field: str | None, cache_folder: str | Path | None) -> TextSource:
    """Return the texts of the file `path`, or of all prompt files in the folder `path`.

    The endings of the file names decide the format. `field` is the key or column that contains the prompts; None means
    "prompt". The column of a table and the texts of a JSON list are copied into `cache_folder`.

    Raises `UserError` for a file whose format cannot be read, for a folder with files of several formats, and if
    `field` is given for a plain text file.
    """
    files = files_in(path) if path.is_dir() else [path]
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1:
        endings = " and ".join(sorted({file.suffix for file in files}))
        raise UserError(
            f"{path}: the folder has {endings} files, but must have files of one format; pass a single file, or use data=mixed"
        )
    (kind,) = kinds
    if kind == TEXT:
        if field is not None:
            raise UserError(
                f"{path}: a text file has no field {field!r}, because each line is a prompt; remove field={field}"
            )
        for file in files:
            require_plain_text(file)
        return LineFiles(files)
    if kind == OBJECTS or (kind == LIST and all(map(holds_lines, files))):
        return LineFiles(files, field or FIELD)
    return open_columns(files, field or FIELD, cache_folder, kind, TABLES[kind])


def kind_of(file: Path) -> str:
    """Return the format of a file by the ending of its name, as one of the values of `KINDS`.

    A file with an unknown ending, or without one, is taken as plain text. Raises `UserError` for an ending such as
    .yaml or .gz, because such files cannot be read as prompts.
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

    If there are .txt, .jsonl, .ndjson or .parquet files, only these are returned, because .json, .csv and .tsv files
    next to them may describe the data set. Otherwise, the .json, .csv and .tsv files are returned.

    Raises `UserError` if there are no prompt files, or if the folder was saved by the library `datasets`.
    """
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"{folder}: this is a saved Hugging Face data set; use data=dataset data.train.dataset={folder}"
        )
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS and file.is_file())
    files = [file for file in found if file.suffix.lower() in IN_FOLDERS] or found
    if not files:
        raise UserError(f"{folder}: the folder has no prompt file ({', '.join(KINDS)}); pass a file or another folder")
    return files


def holds_lines(file: Path) -> bool:
    """Return whether a *.json file contains one JSON object on each line, like a *.jsonl file, instead of a JSON list.

    The first character of the file decides: "{" means an object on each line. Raises `UserError` if the file cannot be
    read.
    """
    try:
        with opened(file) as text:
            return text.read(1 << 16).lstrip("\ufeff \t\r\n").startswith("{")
    except OSError as error:
        raise UserError(
            f"{file}: the prompt file cannot be read ({error.strerror}); correct the path or its permissions"
        ) from error


def delimited_texts(delimiter: str) -> Callable[[Sequence[Path], str, ModuleType], Iterator[list[str | None]]]:
    """Return a function that reads CSV or TSV files for `open_columns`. `delimiter` separates the columns.

    The function takes (paths, field, pyarrow) and yields lists of the texts in the column `field`. The first line of
    each file must contain the names of the columns. The function raises `UserError` for a file that is not a table,
    that has an unclosed quotation mark, or that does not have the column `field` exactly once.
    """

    def texts(paths: Sequence[Path], field: str, pyarrow: ModuleType) -> Iterator[list[str | None]]:
        from pyarrow import csv

        for path in paths:
            require_closed_quotes(path, delimiter)
            try:
                with csv.open_csv(
                    path,
                    parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                    convert_options=csv.ConvertOptions(column_types={field: pyarrow.string()}),
                ) as table:
                    if field not in table.schema.names:
                        raise UserError(
                            f"{path}: no column {field!r}; set field to one of its columns: {', '.join(table.schema.names)}"
                        )
                    if table.schema.names.count(field) > 1:
                        raise UserError(f"{path}: {SEVERAL.format(field=field)}")
                    for batch in table:
                        yield batch.column(table.schema.names.index(field)).to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{path}: cannot be read as a table ({first_line(error)}); make it a UTF-8 file with the same "
                    "number of cells in each row"
                ) from error

    return texts


def listed_texts(paths: Sequence[Path], field: str, pyarrow: ModuleType) -> Iterator[list[str | None]]:
    """Yield the texts of each file as one list. Each file must contain a JSON list.

    The entries of the JSON list must be strings, or objects with a string under the key `field`. Raises `UserError` for
    any other file, and for a file over 1 GB, because a JSON list must be read whole.
    """
    for path in paths:
        if path.stat().st_size > LARGEST_LIST:
            raise UserError(f"{path}: the file is over 1 GB, which is too large for a JSON list; convert it to *.jsonl")
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: cannot be read as JSON ({first_line(error)}); make it a valid JSON file in UTF-8"
            ) from error
        if not isinstance(found, list):
            raise UserError(
                f'{path}: the file must contain a JSON list of prompts, or of objects with a string under "{field}"'
            )
        texts = [entry.get(field) if isinstance(entry, dict) else entry for entry in found]
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise UserError(
                    f'{path}, entry {number}: the entry must be a string, or an object with a string under "{field}"'
                )
            if flaw := flaw_of(text):
                raise UserError(f"{path}, entry {number}: {flaw}")
        yield texts


TABLES = {
    PARQUET: parquet_texts,
    "csv": delimited_texts(","),
    "tsv": delimited_texts("\t"),
    LIST: listed_texts,
}
