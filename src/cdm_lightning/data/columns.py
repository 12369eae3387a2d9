"""Prompts in a column of a table: they are copied into an Arrow file, which is mapped into memory to read single rows.

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
    """The texts of an Arrow file with one column; a null counts as a blank text. Each loader worker opens the file itself.

    `path` is the Arrow file, and `name` what messages call it: the file or data set that it is a copy of.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._state: FileState | None = None  # when it was scanned

    @cached_property
    def column(self) -> Any:
        """The column (pyarrow.ChunkedArray), mapped from the file; `UserError` if the file is damaged."""
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
        """Yield (row, text) for all rows; rows count from 0."""
        self._state = FileState.of(self.path)
        position = 0
        for chunk in self.column.iterchunks():
            for text in chunk.to_pylist():
                yield position, text or ""
                position += 1

    def read(self, position: int) -> str:
        """Return the text of row `position`. `UserError` if the file has changed since `scan`: reading a shorter one could crash."""
        if self._state is not None:
            self._state.require(self.path, self.path)
        return self.column[position].as_py() or ""

    def place(self, position: int) -> str:
        """Name a row for messages, as in "captions.parquet, row 3"; rows count from 1, on through all copied files."""
        return f"{self.name}, row {position + 1}"


def open_columns(
    paths: Sequence[Path], field: str, cache_folder: str | Path | None, kind: str, texts: ReadTexts
) -> ArrowColumn:
    """Return the texts in column `field` of the files at `paths`, from their copy in the cache folder, which is made if needed.

    `texts(paths, field, pyarrow)` reads the files, of the format `kind`, and yields lists of texts. The name of the copy is
    a hash of `kind`, `field` and the files' paths, sizes and modification times, so changed files are copied again. Raises
    `UserError` for a file that is missing, unreadable or without the column.
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
    """Raise `UserError` unless `path` is a parquet file that can be read and whose column `field` holds text."""
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
    """Yield the texts of column `field` of parquet files as lists of at most `BATCH_ROWS`, None for a null.

    Raises `UserError` for a damaged file and for one without a text column of this name.
    """
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
    """Write the texts of all `batches` to the Arrow file `target`, completely or not at all; `UserError` if that fails."""
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
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); set cache_folder=ANOTHER_FOLDER"
        ) from error


def copy_path(cache_folder: str | Path | None, *identity: object) -> Path:
    """Return the path of a column's copy in `cache_folder` (None: the user's cache folder), named by a hash of `identity`."""
    if cache_folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_folder = Path(home) / "cdm_lightning" / "prompts"
    return Path(cache_folder) / f"{hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.arrow"


def import_pyarrow(path: Path) -> ModuleType:
    """Import pyarrow; if it is not installed, raise `UserError` that names `path`, the file to be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: tables need the package pyarrow: {INSTALL}") from error
    return pyarrow
