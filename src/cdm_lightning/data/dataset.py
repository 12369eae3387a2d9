"""Prompts from Hugging Face `datasets`: a folder made by `save_to_disk`, or a data set of the hub.

The library takes seconds to import, so it is imported when it is needed.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cdm_lightning.data.columns import BATCH_ROWS, INSTALL, ArrowColumn, copy_path, first_line, write_column
from cdm_lightning.data.prompts import FIELD, MAX_CHARACTERS, SelectedPrompts
from cdm_lightning.data.selection import Selection, TextSource
from cdm_lightning.errors import UserError


class PromptDataset(SelectedPrompts):
    """The texts of the column `field` in one `split` of a data set.

    `dataset` is a folder that `save_to_disk` wrote, or whatever `datasets.load_dataset` takes: an id of the hub (with
    `subset`, its configuration, and `revision`) or a folder of data files. The library keeps it in Arrow files that are
    mapped into memory, so any row is at hand and a run resumes exactly. `streaming` downloads the column alone, without
    images beside it, and no more than `limit` rows; it is first copied into an Arrow file in `cache_folder`, and later
    starts use that copy even if the hub's data have changed since.

    The other arguments are those of `PromptFile`. Raises `UserError` for a data set, split or column that does not exist.
    """

    def __init__(
        self,
        dataset: str | Path,
        split: str = "train",
        field: str = FIELD,
        subset: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        limit: int | None = None,
        max_characters: int = MAX_CHARACTERS,
        overlong: str = "skip",
        deduplicate: bool = False,
        cache_folder: str | Path | None = None,
    ) -> None:
        selection = Selection(max_characters, overlong, deduplicate)
        name = f"{dataset}, split {split}"
        if limit is not None and (limit < 1 or not streaming):
            raise UserError(f"{name}: limit needs streaming=true and at least 1, got {limit}")
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
    """The texts of one column of a `datasets.Dataset`; a missing text counts as blank."""

    def __init__(self, rows: Any, field: str, name: str) -> None:
        self.rows, self.field, self.name = rows, field, name

    def scan(self) -> Iterator[tuple[int, str]]:
        """(row, text) of all rows."""
        position = 0
        for batch in self.rows.iter(batch_size=BATCH_ROWS):
            for text in checked(batch[self.field], self.field, self.name):
                yield position, text or ""
                position += 1

    def read(self, position: int) -> str:
        """The text of a row."""
        return self.rows[position][self.field] or ""

    def place(self, position: int) -> str:
        """ "owner/name, split train, row 3", rows counted from 1."""
        return f"{self.name}, row {position + 1}"


def streamed_texts(rows: Any, field: str, name: str) -> Iterator[list[str | None]]:
    """The texts of a streamed data set, some thousand at a time."""
    for batch in rows.iter(batch_size=BATCH_ROWS):
        yield checked(batch[field], field, name)


def checked(texts: list, field: str, name: str) -> list[str | None]:
    """The same list; UserError if something else than text is in it."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise UserError(f"{name}: the column {field!r} holds {type(text).__name__}, not text; set field=NAME")
    return texts


def load_column(
    dataset: str, split: str, field: str, subset: str | None, revision: str | None, streaming: bool = False
) -> Any:
    """The data set with that column alone (`datasets.Dataset`, or `IterableDataset` if streaming)."""
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
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_saved(library: ModuleType, folder: Path, split: str) -> Any:
    """A saved data set, or one split of several saved together; UserError for a split that is not there."""
    loaded = library.load_from_disk(str(folder))
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise UserError(f"{folder}: no split {split!r}, it has {', '.join(loaded)}")
    return loaded[split]


def import_datasets(name: str) -> ModuleType:
    """The library; UserError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: needs the package datasets: {INSTALL}") from error
    return datasets
