"""Texts in a column of a table, kept in an Arrow file: mapped into memory, any row readable alone.

Parquet stores rows in compressed groups, so that reading one at random means unpacking a whole group; its column is
therefore copied once into an uncompressed Arrow file, by the group, in little memory. `pyarrow` is imported when needed.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from cdm_lightning.errors import UserError

BATCH_ROWS = 10_000
INSTALL = "pip install 'cdm-lightning[data]'"


class ArrowColumn:
    """The texts of an Arrow file with one column; a missing text counts as blank. Opened anew in each loader worker."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    @cached_property
    def column(self) -> Any:
        """The column (pyarrow.ChunkedArray), mapped from the file."""
        pyarrow = import_pyarrow(self.path)
        try:
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path))).read_all().column(0)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{self.path}: cannot be read ({first_line(error)}); delete the file, it is a copy"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name}

    def scan(self) -> Iterator[tuple[int, str]]:
        """(row, text) of all rows."""
        position = 0
        for chunk in self.column.iterchunks():
            for text in chunk.to_pylist():
                yield position, text or ""
                position += 1

    def read(self, position: int) -> str:
        """The text of a row."""
        return self.column[position].as_py() or ""

    def place(self, position: int) -> str:
        """ "captions.parquet, row 3", rows counted from 1 through all files."""
        return f"{self.name}, row {position + 1}"


def open_parquet(paths: Sequence[Path], field: str, cache_folder: str | Path | None) -> ArrowColumn:
    """The column `field` of parquet files, copied into the cache folder if it is not there yet.

    The copy is named by a hash of the files' paths, sizes and times of change, so changed files are copied anew.
    Raises `UserError` for a file that is missing, unreadable or without the column.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: cannot read the prompt file (no such file)")
    pyarrow = import_pyarrow(paths[0])
    for path in paths:
        check_column(path, field, pyarrow)
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    target = copy_path(cache_folder, "parquet", field, states)
    if not target.is_file():
        write_column(target, parquet_texts(paths, field, pyarrow))
    return ArrowColumn(target, str(paths[0] if len(paths) == 1 else paths[0].parent))


def check_column(path: Path, field: str, pyarrow: ModuleType) -> None:
    """UserError unless the parquet file can be read and its column `field` holds text."""
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({first_line(error)}); copy it again") from error
    if field not in schema.names:
        raise UserError(f"{path}: no column {field!r}, it has {', '.join(schema.names)}; set field=NAME")
    kind = schema.field(field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise UserError(f"{path}: the column {field!r} holds {kind}, not text; set field=NAME")


def parquet_texts(paths: Sequence[Path], field: str, pyarrow: ModuleType) -> Iterator[list[str | None]]:
    """The texts of the column, some thousand at a time; UserError for a file whose data are broken."""
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[field]):
                    yield batch.column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({first_line(error)}); copy it again") from error


def write_column(target: Path, batches: Iterable[Sequence[str | None]]) -> None:
    """Write the texts as an Arrow file with one column, whole or not at all; UserError if that fails."""
    pyarrow = import_pyarrow(target)
    schema = pyarrow.schema([("text", pyarrow.large_string())])
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
            for texts in batches:
                writer.write_batch(pyarrow.record_batch([pyarrow.array(texts, pyarrow.large_string())], schema=schema))
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); set cache_folder=FOLDER") from error
    finally:
        temporary.unlink(missing_ok=True)


def copy_path(cache_folder: str | Path | None, *identity: object) -> Path:
    """Where the copy of a column lies, named by a hash of what it is a copy of."""
    if cache_folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_folder = Path(home) / "cdm_lightning" / "prompts"
    return Path(cache_folder) / f"{hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.arrow"


def import_pyarrow(path: Path) -> ModuleType:
    """The library; UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: tables need the package pyarrow: {INSTALL}") from error
    return pyarrow


def first_line(error: BaseException) -> str:
    """First line of an error's text, without its final full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
