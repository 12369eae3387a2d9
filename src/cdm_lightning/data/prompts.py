"""Sets of prompts that can be read in any order, from files or from the configuration.

Of the prompts in files only the positions are kept in memory, not the texts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from torch import Tensor
from torch.utils.data import Dataset

from cdm_lightning.data.batches import Order, ShuffledEpochs
from cdm_lightning.data.formats import open_files
from cdm_lightning.data.selection import Selection, TextSource, flaw_of, is_visible
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import Count, Field, FileOrFolder, FolderToRead, NotEmpty, Overlong, Prompt

MAX_CHARACTERS = 10_000


class Prompts(Dataset, ABC):
    """A set of prompts by number: their texts, the order in which training takes them, and in some sets their real images."""

    has_images = False  # whether the prompts have images, which `image` returns

    def image(self, index: int) -> Tensor:
        """Return the real image of prompt `index`, (3, H, W) in [0, 1]; raise `UserError` for a set without images."""
        raise UserError(f"{type(self).__name__} holds prompts without images")

    @property
    def summary(self) -> str | None:
        """One line to print: how many prompts the set holds and which were left out; None if there is nothing to report."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of prompts."""

    @abstractmethod
    def __getitem__(self, index: int) -> str:
        """Return prompt number `index`; raise IndexError if `index` is beyond the last prompt."""

    def order(self, seed: int) -> Order:
        """Return the order of training: a function from a position in it, from 0 without end, to the number of a prompt.

        By default these are epochs, each shuffled by a function of `seed`.
        """
        return ShuffledEpochs(len(self), seed)


class SelectedPrompts(Prompts):
    """The texts of `source` that `selection` keeps: without blank, over-long and, if requested, repeated ones.

    `name` is what messages call the source. `counts` says how many texts were left out. Raises `UserError` if none is left.
    """

    def __init__(self, source: TextSource, name: str, selection: Selection) -> None:
        self.source, self.name = source, name
        self.positions, self.counts = selection.select(source, name)
        if not len(self.positions):
            left_out = f" ({self.counts.left_out})" if self.counts.left_out else "; write one prompt on each line"
            raise UserError(f"{name}: the prompt file holds no prompt{left_out}")

    @property
    def summary(self) -> str | None:
        """One line such as "captions.txt: 9,998 prompts, left out: 1 blank, 1 repeated"; None if nothing was left out."""
        left_out = self.counts.left_out
        return f"{self.name}: {len(self):,} prompts, left out: {left_out}" if left_out else None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> str:
        """Return prompt number `index`, counted without those that were left out; `UserError` if its file has changed."""
        prompt = self.source.read(int(self.positions[index])).strip()
        if not is_visible(prompt):
            raise UserError(f"{self.name}: prompt {index} has become blank since the run began; restore the file")
        return prompt


class PromptFile(SelectedPrompts):
    """The prompts of a file, or of a folder with files of one format, which are read in the order of their paths.

    A text file holds one prompt on each line, a `*.jsonl` file one object on each line with the prompt under `field`
    (default: "prompt"). `*.parquet`, `*.csv` and `*.tsv` files have a column `field`, and a `*.json` file holds a list of
    texts, or of objects with the prompt under `field`. Such a column or list is copied once into `cache_folder` (default:
    the user's cache folder), from which single rows can be read. All texts are checked once, when the file is opened.
    Afterwards only the position of each prompt is in memory (8 bytes).

    Prompts without a visible character are left out. With `overlong="skip"`, prompts of more than `max_characters` are left
    out too; "refuse" raises `UserError` for the first one. `deduplicate` keeps only the first of several prompts that differ
    in nothing but white space. `counts` says how many prompts were left out.

    Raises `UserError` for a file that is missing, empty, not UTF-8 or not in the format of its ending, for a `field`
    that does not exist, and for a prompt that no tokenizer can read.
    """

    def __init__(
        self,
        path: FileOrFolder,
        field: Field | None = None,
        max_characters: Count = MAX_CHARACTERS,
        overlong: Overlong = "skip",
        deduplicate: bool = False,
        cache_folder: FolderToRead | None = None,
    ) -> None:
        selection = Selection(max_characters, overlong, deduplicate)
        super().__init__(open_files(Path(path), field, cache_folder), str(path), selection)


class PromptList(Prompts):
    """Prompts that stand in the configuration itself; the whole list is repeated `repeat` times.

    Raises `UserError` for an empty list, a `repeat` below 1, and a prompt that is not a text or that no tokenizer can read.
    """

    def __init__(self, prompts: Annotated[Sequence[Prompt], NotEmpty], repeat: Count = 1) -> None:
        self.prompts, self.repeat = list(prompts), repeat
        if not self.prompts or repeat < 1:
            raise UserError(
                f"data: {f'repeat={repeat} must be at least 1' if self.prompts else 'the list of prompts is empty; give at least one'}"
            )
        for number, prompt in enumerate(self.prompts, start=1):
            flaw = flaw_of(prompt) if isinstance(prompt, str) else f"{prompt!r} is not a text; put it in quotes"
            if flaw:
                raise UserError(f"data: prompt {number} of the list: {flaw}")

    def __len__(self) -> int:
        return len(self.prompts) * self.repeat

    def __getitem__(self, index: int) -> str:
        """Return prompt number `index` of the repeated list; IndexError if `index` is beyond its end."""
        if index >= len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return self.prompts[index % len(self.prompts)]
