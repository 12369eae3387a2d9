"""Prompts from Hugging Face `datasets`: from a folder that `save_to_disk` wrote, or from a data set on the hub.

Importing the library `datasets` takes seconds, so it is imported only when it is needed.
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

    `dataset` is an id on the hub, a folder that `save_to_disk` wrote, or a folder of data files. `subset` is the name
    of the configuration on the hub, and `revision` a branch, tag or commit.

    With `streaming`, only the first `limit` rows (None: all rows) of the column `field` are downloaded; other columns,
    for example of images, are not. The downloaded texts are kept in an Arrow file in `cache_folder`. Later runs read
    this file, even if the data set on the hub has changed.

    `PromptFile` explains `max_characters`, `overlong`, `deduplicate` and `cache_folder`. Raises `UserError` if the data
    set, split or column does not exist, if `limit` is below 1, or if `limit` is given without `streaming`.
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
            flaw = "must be at least 1" if limit < 1 else "needs streaming=true; set it, or limit=null"
            raise UserError(f"{name}: limit={limit} {flaw}")
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
    """The texts in the column `field` of `rows`, a `datasets.Dataset`. A null counts as a blank text.

    `name` is the name of the data set in messages.
    """

    def __init__(self, rows: Any, field: str, name: str) -> None:
        self.rows, self.field, self.name = rows, field, name

    def scan(self) -> Iterator[tuple[int, str]]:
        """Yield (row, text) for all rows; rows count from 0. Raises `UserError` for a value that is not a string."""
        position = 0
        for batch in self.rows.iter(batch_size=BATCH_ROWS):
            for text in checked(batch[self.field], self.field, self.name):
                yield position, text or ""
                position += 1

    def read(self, position: int) -> str:
        """Return the text of row `position`, counted from 0."""
        return self.rows[position][self.field] or ""

    def place(self, position: int) -> str:
        """Return the name of the row `position` for messages, such as "owner/name, split train, row 3".

        The name counts rows from 1, whereas `position` counts from 0.
        """
        return f"{self.name}, row {position + 1}"


def streamed_texts(rows: Any, field: str, name: str) -> Iterator[list[str | None]]:
    """Yield the texts in the column `field` of `rows`, an `IterableDataset`, as lists of at most `BATCH_ROWS` texts.

    A null becomes None. Raises `UserError` for a value that is not a string; `name` is the data set's name in the
    message.
    """
    for batch in rows.iter(batch_size=BATCH_ROWS):
        yield checked(batch[field], field, name)


def checked(texts: list, field: str, name: str) -> list[str | None]:
    """Return `texts` unchanged if each of them is a string or None. Otherwise raise `UserError`.

    `field` and `name` are the names of the column and of the data set in the message.
    """
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{name}: the column {field!r} contains {type(text).__name__}, not strings; set field to a column of strings"
            )
    return texts


def load_column(
    dataset: str, split: str, field: str, subset: str | None, revision: str | None, streaming: bool = False
) -> Any:
    """Load the column `field` of the split `split` of a data set, and return it as a `datasets.Dataset`.

    With `streaming`, the result is an `IterableDataset` instead. `PromptDataset` explains the other arguments. Raises
    `UserError` if the data set cannot be loaded, or has no such split or column.
    """
    library = import_datasets(dataset)
    try:
        if is_saved(Path(dataset)):
            rows = load_saved(library, Path(dataset), split)
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = library.load_dataset(dataset, subset, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise UserError(
            f"{dataset}: the data set cannot be loaded ({first_line(error)}); "
            "correct the options dataset, subset, split or revision"
        ) from error
    columns = rows.column_names
    if columns is not None and field not in columns:
        raise UserError(f"{dataset}: no column {field!r}; set field to one of its columns: {', '.join(columns)}")
    return rows.select_columns([field])


def is_saved(folder: Path) -> bool:
    """Return whether `folder` was written by `save_to_disk` of the library `datasets`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_saved(library: ModuleType, folder: Path, split: str) -> Any:
    """Load the data set that `save_to_disk` wrote into `folder`. `library` is the imported library `datasets`.

    If the folder contains several splits, the one with the name `split` is loaded; without such a split, `UserError` is
    raised. If the folder contains a single data set, `split` is ignored.
    """
    loaded = library.load_from_disk(str(folder))
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise UserError(f"{folder}: no split {split!r}; set split to one of these: {', '.join(loaded)}")
    return loaded[split]


def import_datasets(name: str) -> ModuleType:
    """Import and return the library `datasets`, which is needed to load the data set `name`.

    Raises `UserError` if the library is not installed; the message contains `name`.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: the package datasets is needed to read this data set; install it: {INSTALL}"
        ) from error
    return datasets
