"""Texts in a column of a table, kept in an Arrow file that is mapped into memory, so that any row can be read alone.

Parquet stores rows in compressed groups, so reading one row means unpacking a whole group. A parquet column is therefore
copied once into an uncompressed Arrow file, group by group, which needs little memory. `pyarrow` is imported when needed.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from cdm_lightning.data.unchanged import FileState
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, replacing

BATCH_ROWS = 10_000
ReadTexts = Callable[[Sequence[Path], str, ModuleType], Iterator[list[str | None]]]  # (files, field, pyarrow) -> texts
INSTALL = "pip install 'cdm-lightning[data]'"


class ArrowColumn:
    """The texts of an Arrow file with one column; a missing text counts as blank. Each loader worker opens the file itself."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._state: FileState | None = None  # when it was scanned

    @cached_property
    def column(self) -> Any:
        """The column (pyarrow.ChunkedArray), mapped from the file."""
        pyarrow = import_pyarrow(self.path)
        try:
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path))).read_all().column(0)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{self.path}: cannot be read ({first_line(error)}); delete this file: it is a copy and is made again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name, "_state": self._state}

    def scan(self) -> Iterator[tuple[int, str]]:
        """Yield (row, text) for all rows."""
        self._state = FileState.of(self.path)
        position = 0
        for chunk in self.column.iterchunks():
            for text in chunk.to_pylist():
                yield position, text or ""
                position += 1

    def read(self, position: int) -> str:
        """Return the text of a row; raise `UserError` if the file has changed, since reading a cut map ends the process."""
        if self._state is not None:
            self._state.require(self.path, self.path)
        return self.column[position].as_py() or ""

    def place(self, position: int) -> str:
        """Return the place of a row as in "captions.parquet, row 3"; rows count from 1 through all files."""
        return f"{self.name}, row {position + 1}"


def open_columns(
    paths: Sequence[Path], field: str, cache_folder: str | Path | None, kind: str, texts: ReadTexts
) -> ArrowColumn:
    """Open the texts under `field` of files, after `texts` has copied them into the cache folder if no copy is there yet.

    The name of the copy is a hash of the `kind` and of the files' paths, sizes and modification times, so changed files are
    copied again. Raises `UserError` for a file that is missing, unreadable or without the column.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: cannot read the prompt file (no such file)")
    pyarrow = import_pyarrow(paths[0])
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    target = copy_path(cache_folder, kind, field, states)
    if not target.is_file():
        batches = texts(paths, field, pyarrow)
        first = next(batches, [])  # an unreadable file is refused before anything is written
        write_column(target, chain([first], batches))
    return ArrowColumn(target, str(paths[0] if len(paths) == 1 else paths[0].parent))


def check_column(path: Path, field: str, pyarrow: ModuleType) -> None:
    """Raise `UserError` unless the parquet file can be read and its column `field` holds text."""
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as parquet ({first_line(error)}); replace it with an intact copy"
        ) from error
    if field not in schema.names:
        raise UserError(f"{path}: no column {field!r}, it has {', '.join(schema.names)}; set field=NAME")
    kind = schema.field(field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise UserError(f"{path}: the column {field!r} holds {kind}, not text; set field=NAME")


def parquet_texts(paths: Sequence[Path], field: str, pyarrow: ModuleType) -> Iterator[list[str | None]]:
    """Yield the texts of the column, `BATCH_ROWS` at a time at most; raise `UserError` for a damaged file."""
    for path in paths:
        check_column(path, field, pyarrow)
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[field]):
                    yield batch.column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: cannot be read as parquet ({first_line(error)}); replace it with an intact copy"
            ) from error


def write_column(target: Path, batches: Iterable[Sequence[str | None]]) -> None:
    """Write the texts as an Arrow file with one column, completely or not at all; raise `UserError` if that fails."""
    pyarrow = import_pyarrow(target)
    schema = pyarrow.schema([("text", pyarrow.large_string())])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(target) as temporary,
            pyarrow.OSFile(str(temporary), "wb") as sink,
            pyarrow.ipc.new_file(sink, schema) as writer,
        ):
            for texts in batches:
                writer.write_batch(pyarrow.record_batch([pyarrow.array(texts, pyarrow.large_string())], schema=schema))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); set cache_folder=FOLDER") from error


def copy_path(cache_folder: str | Path | None, *identity: object) -> Path:
    """Return the path of a column's copy; its name is a hash of `identity`, which says what is copied."""
    if cache_folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_folder = Path(home) / "cdm_lightning" / "prompts"
    return Path(cache_folder) / f"{hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.arrow"


def import_pyarrow(path: Path) -> ModuleType:
    """Import pyarrow; raise `UserError`, which names `path`, if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: tables need the package pyarrow: {INSTALL}") from error
    return pyarrow
