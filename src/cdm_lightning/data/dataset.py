"""Prompts from Hugging Face `datasets`: from a folder made by `save_to_disk`, or from a data set of the hub.

Importing `datasets` takes seconds, so it is imported only when it is needed.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cdm_lightning.data.columns import BATCH_ROWS, INSTALL, ArrowColumn, copy_path, write_column
from cdm_lightning.data.formats import FIELD
from cdm_lightning.data.prompts import MAX_CHARACTERS, SelectedPrompts
from cdm_lightning.data.selection import Selection, TextSource
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line
from cdm_lightning.kinds import Count, Field, FileOrFolder, FolderToRead, Name, Overlong, Revision


class PromptDataset(SelectedPrompts):
    """Prompts from the text column `field` in one `split` of a Hugging Face data set.

    `dataset` is a folder that `save_to_disk` wrote, or anything that `datasets.load_dataset` takes: an id of the hub (with
    `subset`, the name of its configuration, and `revision`) or a folder of data files. `datasets` keeps it in Arrow files
    that are mapped into memory, so that any row can be read alone. With `streaming`, only this column is downloaded, for
    example without the images in other columns, and only the first `limit` rows (None: all). It is copied into an Arrow file
    in `cache_folder`; later starts use that copy even if the data set on the hub has changed.

    `max_characters`, `overlong`, `deduplicate` and `cache_folder` are those of `PromptFile`. Raises `UserError` for a data
    set, split or column that does not exist, and for a `limit` that is below 1 or given without `streaming`.
    """

    def __init__(
        self,
        dataset: FileOrFolder,
        split: Name = "train",
        field: Field = FIELD,
        subset: Name | None = None,
        revision: Revision | None = None,
        streaming: bool = False,
        limit: Count | None = None,
        max_characters: Count = MAX_CHARACTERS,
        overlong: Overlong = "skip",
        deduplicate: bool = False,
        cache_folder: FolderToRead | None = None,
    ) -> None:
        selection = Selection(max_characters, overlong, deduplicate)
        name = f"{dataset}, split {split}"
        if limit is not None and (limit < 1 or not streaming):
            raise UserError(f"{name}: limit={limit} {'must be at least 1' if limit < 1 else 'needs streaming=true'}")
        if streaming:
            what = (str(dataset), subset, split, revision)
            target = copy_path(cache_folder, "stream", *what, field, limit)
            if not target.is_file():
                rows = load_column(str(dataset), split, field, subset, revision, streaming=True)
                write_column(target, streamed_texts(rows if limit is None else rows.take(limit), field, name))
            source: TextSource = ArrowColumn(target, name)
        else:
            source = DatasetColumn(load_column(str(dataset), split, field, subset, revision), field, name)
        super().__init__(source, name, selection)


class DatasetColumn:
    """The texts in column `field` of `rows`, a `datasets.Dataset` that messages call `name`; a null counts as blank."""

    def __init__(self, rows: Any, field: str, name: str) -> None:
        self.rows, self.field, self.name = rows, field, name

    def scan(self) -> Iterator[tuple[int, str]]:
        """Yield (row, text) for all rows; rows count from 0. `UserError` for a value that is not a text."""
        position = 0
        for batch in self.rows.iter(batch_size=BATCH_ROWS):
            for text in checked(batch[self.field], self.field, self.name):
                yield position, text or ""
                position += 1

    def read(self, position: int) -> str:
        """Return the text of row `position`."""
        return self.rows[position][self.field] or ""

    def place(self, position: int) -> str:
        """Name a row for messages, as in "owner/name, split train, row 3"; rows count from 1."""
        return f"{self.name}, row {position + 1}"


def streamed_texts(rows: Any, field: str, name: str) -> Iterator[list[str | None]]:
    """Yield the texts in column `field` of an `IterableDataset` as lists of at most `BATCH_ROWS`, None for a null.

    `UserError`, which calls the data set `name`, for a value that is not a text.
    """
    for batch in rows.iter(batch_size=BATCH_ROWS):
        yield checked(batch[field], field, name)


def checked(texts: list, field: str, name: str) -> list[str | None]:
    """Return `texts` unchanged; raise `UserError`, which names data set and column, if an entry is neither a text nor None."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise UserError(f"{name}: the column {field!r} holds {type(text).__name__}, not text; set field=NAME")
    return texts


def load_column(
    dataset: str, split: str, field: str, subset: str | None, revision: str | None, streaming: bool = False
) -> Any:
    """Load one split with only the column `field`: a `datasets.Dataset`, or an `IterableDataset` if streaming.

    `UserError` if the data set cannot be loaded or has no such split or column.
    """
    library = import_datasets(dataset)
    try:
        if is_saved(Path(dataset)):
            rows = load_saved(library, Path(dataset), split)
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = library.load_dataset(dataset, subset, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise UserError(f"{dataset}: the data set cannot be loaded ({first_line(error)})") from error
    columns = rows.column_names
    if columns is not None and field not in columns:
        raise UserError(f"{dataset}: no column {field!r}, it has {', '.join(columns)}; set field=NAME")
    return rows.select_columns([field])


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of the library `datasets` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_saved(library: ModuleType, folder: Path, split: str) -> Any:
    """Load what `save_to_disk` wrote: a single data set whatever `split` is, or this split of several; `UserError` if missing."""
    loaded = library.load_from_disk(str(folder))
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise UserError(f"{folder}: no split {split!r}, it has {', '.join(loaded)}; set split=NAME")
    return loaded[split]


def import_datasets(name: str) -> ModuleType:
    """Import `datasets`; if it is not installed, raise `UserError` that names `name`, the data set to be loaded."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: this data set needs the package datasets: {INSTALL}") from error
    return datasets
