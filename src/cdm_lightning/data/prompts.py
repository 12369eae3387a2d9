"""Prompts with random access: from files, or a few given ones. None are held in memory, only where each of them lies."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from cdm_lightning.data.batches import Order, ShuffledEpochs
from cdm_lightning.data.columns import open_parquet
from cdm_lightning.data.lines import LineFiles
from cdm_lightning.data.selection import Selection, TextSource
from cdm_lightning.errors import UserError

LINES, PARQUET = (".txt", ".jsonl"), ".parquet"
FIELD = "prompt"  # of .jsonl and .parquet, where none is given
MAX_CHARACTERS = 10_000


class Prompts(Dataset, ABC):
    """A set of prompts: `len`, the text of each, the order in which training takes them, in some sets an image of each."""

    has_images = False  # whether `image` gives something

    def image(self, index: int) -> Tensor:
        """The real image of prompt number `index`, (3, H, W) in [0, 1]; UserError for a set of prompts alone."""
        raise UserError(f"{type(self).__name__} holds prompts without images")

    @property
    def summary(self) -> str | None:
        """What there is and what was left out, in one line; None if there is nothing to say."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> str:
        """Prompt number `index`; IndexError beyond the last."""

    def order(self, seed: int) -> Order:
        """Position in the endless stream -> number of the prompt."""
        return ShuffledEpochs(len(self), seed)


class SelectedPrompts(Prompts):
    """The prompts of a `source` that are not left out: blank ones, over-long ones and, if asked for, repeated ones.

    `name` says in messages where they come from. Raises `UserError` if none is left.
    """

    def __init__(self, source: TextSource, name: str, selection: Selection) -> None:
        self.source, self.name = source, name
        self.positions, self.counts = selection.select(source, name)
        if not len(self.positions):
            left_out = f" ({self.counts.left_out})" if self.counts.left_out else "; write one a line"
            raise UserError(f"{name}: the prompt file holds no prompt{left_out}")

    @property
    def summary(self) -> str | None:
        """ "captions.txt: 9,998 prompts, left out: 1 blank, 1 repeated"; None if nothing was left out."""
        left_out = self.counts.left_out
        return f"{self.name}: {len(self):,} prompts, left out: {left_out}" if left_out else None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> str:
        """Prompt number `index`, counted without those that are left out."""
        return self.source.read(int(self.positions[index])).strip()


class PromptFile(SelectedPrompts):
    """The prompts of a file or of a folder of files of one kind, in the order of their names.

    Text files hold one prompt a line, `*.jsonl` files an object a line with the prompt under `field`, `*.parquet` files
    a column `field`. A parquet column is copied once into `cache_folder` (default: the user's cache folder), where any
    row can be read alone. Everything is checked once, when it is opened; afterwards only the position of each prompt is
    kept, 8 bytes in a tensor that loader workers share.

    Blank prompts are left out; those of more than `max_characters` too, or they are refused with `overlong="refuse"`;
    `deduplicate` keeps the first of those that differ in white space at most. `counts` says how many.

    Raises `UserError` for what is missing, empty, not UTF-8 or not of its kind, and for a `field` that does not exist.
    """

    def __init__(
        self,
        path: str | Path,
        field: str | None = None,
        max_characters: int = MAX_CHARACTERS,
        overlong: str = "skip",
        deduplicate: bool = False,
        cache_folder: str | Path | None = None,
    ) -> None:
        selection = Selection(max_characters, overlong, deduplicate)
        super().__init__(open_files(Path(path), field, cache_folder), str(path), selection)


class PromptList(Prompts):
    """A few prompts given in the configuration, `repeat` times over; `UserError` if there are none."""

    def __init__(self, prompts: Sequence[str], repeat: int = 1) -> None:
        self.prompts, self.repeat = list(prompts), repeat
        if not self.prompts or repeat < 1:
            raise UserError("a prompt list needs at least one prompt and repeat of at least 1")

    def __len__(self) -> int:
        return len(self.prompts) * self.repeat

    def __getitem__(self, index: int) -> str:
        """Prompt number `index`."""
        if index >= len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return self.prompts[index % len(self.prompts)]


def open_files(path: Path, field: str | None, cache_folder: str | Path | None) -> TextSource:
    """The texts of a file or folder, by the endings of its files; UserError if they cannot be told or are mixed."""
    files = files_in(path) if path.is_dir() else [path]
    kinds = {file.suffix if file.suffix in (*LINES, PARQUET) else LINES[0] for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{path}: holds {' and '.join(sorted(kinds))} files; a folder must hold one kind: use data=mixed"
        )
    (kind,) = kinds
    if kind == LINES[0] and field is not None:
        raise UserError(
            f"{path}: `field: {field}` needs a .jsonl or .parquet file; a text file holds one prompt a line"
        )
    if kind == PARQUET:
        return open_parquet(files, field or FIELD, cache_folder)
    return LineFiles(files, None if kind == LINES[0] else field or FIELD)


def files_in(folder: Path) -> list[Path]:
    """The prompt files below a folder, sorted by name."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise UserError(f"{folder}: a saved Hugging Face data set; use data=dataset data.train.dataset={folder}")
    files = sorted(file for file in folder.rglob("*") if file.suffix in (*LINES, PARQUET) and file.is_file())
    if not files:
        raise UserError(f"{folder}: the folder holds no {', '.join((*LINES, PARQUET))} file")
    return files
