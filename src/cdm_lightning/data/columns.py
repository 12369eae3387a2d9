"""Prompts in a column of a table. The column is copied into an Arrow file, from which single rows can be read quickly.

Parquet compresses rows in groups, so reading one row would mean unpacking a whole group. The copy is made once, group
by group, and uses little memory. `pyarrow` is imported only when it is needed.
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
SEVERAL = "several columns have the name {field!r}; rename all but one of them"
INSTALL = "pip install 'cdm-lightning[data]'"


class ArrowColumn:
    """The texts in an Arrow file with one column. A null counts as a blank text.

    `path` is the Arrow file. Messages use `name` as the name of the file or data set from which the Arrow file was
    copied. Each loader worker opens the Arrow file itself.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._state: FileState | None = None  # when it was scanned

    @cached_property
    def column(self) -> Any:
        """The column (pyarrow.ChunkedArray), mapped into memory. Raises `UserError` if the file is damaged."""
        pyarrow = import_pyarrow(self.path)
        try:
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path))).read_all().column(0)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{self.path}: cannot be read ({first_line(error)}); delete this copy, and it will be made again"
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
        """Return the text of row `position`, counted from 0.

        Raises `UserError` if the file has changed since `scan`, because reading from a shorter file could crash.
        """
        if self._state is not None:
            self._state.require(self.path, self.path)
        return self.column[position].as_py() or ""

    def place(self, position: int) -> str:
        """Return the name of the row `position` for messages, such as "captions.parquet, row 3".

        The name counts rows from 1. If the Arrow file is a copy of several files, the count continues from file to
        file.
        """
        return f"{self.name}, row {position + 1}"


def open_columns(
    paths: Sequence[Path], field: str, cache_folder: str | Path | None, kind: str, texts: ReadTexts
) -> ArrowColumn:
    """Return the texts in the column `field` of the files at `paths`, read from a copy in `cache_folder`.

    If there is no copy yet, it is made from `texts(paths, field, pyarrow)`, which yields lists of texts. The copy's
    name is a hash of `kind` (the name of the file format), `field`, and the paths, sizes and modification times of the
    files. If one of the files changes, a new copy is therefore made.

    Raises `UserError` for a file that does not exist, cannot be read or has no column `field`.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: this prompt file does not exist; correct the path")
    pyarrow = import_pyarrow(paths[0])
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    target = copy_path(cache_folder, kind, field, states)
    if not target.is_file():
        batches = texts(paths, field, pyarrow)
        first = next(batches, [])  # an unreadable file is refused before anything is written
        write_column(target, chain([first], batches))
    return ArrowColumn(target, str(paths[0] if len(paths) == 1 else paths[0].parent))


def check_column(path: Path, field: str, pyarrow: ModuleType) -> None:
    """Raise `UserError` unless `path` is a readable parquet file that has the column `field` exactly once.

    The column must contain strings. `pyarrow` is the imported library.
    """
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as parquet ({first_line(error)}); replace it with an intact copy"
        ) from error
    if field not in schema.names:
        raise UserError(f"{path}: no column {field!r}; set field to one of its columns: {', '.join(schema.names)}")
    if schema.names.count(field) > 1:
        raise UserError(f"{path}: {SEVERAL.format(field=field)}")
    kind = schema.field(field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise UserError(f"{path}: the column {field!r} contains {kind}, not strings; set field to a column of strings")


def parquet_texts(paths: Sequence[Path], field: str, pyarrow: ModuleType) -> Iterator[list[str | None]]:
    """Yield the texts in column `field` of parquet files, as lists of at most `BATCH_ROWS` texts. A null becomes None.

    Raises `UserError` for a damaged file, or a file whose column `field` is missing or does not contain strings.
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
    """Write the texts of all `batches` to the Arrow file `target`, completely or not at all.

    Raises `UserError` if the file cannot be written.
    """
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
    """Return the path of a column's copy in `cache_folder`. The file name is a hash of `identity`.

    `identity` are the values that distinguish this column from all others. If `cache_folder` is None, the folder is
    `cdm_lightning/prompts` in $XDG_CACHE_HOME or ~/.cache.
    """
    if cache_folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_folder = Path(home) / "cdm_lightning" / "prompts"
    return Path(cache_folder) / f"{hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.arrow"


def import_pyarrow(path: Path) -> ModuleType:
    """Import and return pyarrow, which is needed to read the file `path`.

    Raises `UserError` if pyarrow is not installed; the message names `path`.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: the package pyarrow is needed to read this file; install it: {INSTALL}") from error
    return pyarrow
