"""Sets of prompts that can be read in any order, from files or from the configuration.

Only the positions of prompts in files are kept in memory, not their texts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from torch import Tensor
from torch.utils.data import Dataset

from cdm_lightning.data.batches import Order, ShuffledEpochs
from cdm_lightning.data.formats import open_files
from cdm_lightning.data.selection import Selection, TextSource, flaw_of_given, is_visible
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import Count, Field, FileOrFolder, FolderToRead, NotEmpty, Overlong, Prompt

MAX_CHARACTERS = 10_000


class Prompts(Dataset, ABC):
    """A set of numbered prompts, with their training order. Some sets also have real images of the prompts."""

    has_images = False  # whether the prompts have images, which `image` returns

    def image(self, index: int) -> Tensor:
        """Return the real image of prompt `index`, (3, H, W) in [0, 1]. Raises `UserError` if the set has no images."""
        raise UserError(
            f"a {type(self).__name__} has no images; use a set of captioned images, such as data=captioned_images"
        )

    @property
    def summary(self) -> str | None:
        """One line for the user, such as how many texts were left out, or None if there is nothing to report."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of prompts."""

    @abstractmethod
    def __getitem__(self, index: int) -> str:
        """Return prompt number `index`. Raises IndexError if it does not exist."""

    def order(self, seed: int) -> Order:
        """Return the endless training order: a function that maps a position, from 0 on, to the number of a prompt.

        By default, the order consists of epochs, each shuffled by `seed`.
        """
        return ShuffledEpochs(len(self), seed)


class SelectedPrompts(Prompts):
    """The texts of `source` that `selection` keeps as prompts.

    `name` is the name of the source in messages. The attribute `counts` says how many texts were left out. Raises
    `UserError` if no text is left.
    """

    def __init__(self, source: TextSource, name: str, selection: Selection) -> None:
        self.source, self.name = source, name
        self.positions, self.counts = selection.select(source, name)
        if not len(self.positions):
            left_out = f" (left out: {self.counts.left_out})" if self.counts.left_out else ""
            raise UserError(f"{name}: the prompt file has no prompts{left_out}; write at least one")

    @property
    def summary(self) -> str | None:
        """One line such as "captions.txt: 9,998 prompts, left out: 1 blank, 1 repeated".

        It is None if no text was left out.
        """
        left_out = self.counts.left_out
        return f"{self.name}: {len(self):,} prompts, left out: {left_out}" if left_out else None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> str:
        """Return prompt number `index`, counted without the texts that were left out.

        Raises `UserError` if the file has changed.
        """
        prompt = self.source.read(int(self.positions[index])).strip()
        if not is_visible(prompt):
            raise UserError(f"{self.name}: prompt {index} has become blank since the run began; restore the file")
        return prompt


class PromptFile(SelectedPrompts):
    """The prompts in a file, or in all files of a folder, which are read in the order of their paths.

    - A text file has one prompt on each line.
    - A `*.jsonl` file has one object on each line, with the prompt under `field` (default: "prompt").
    - A `*.parquet`, `*.csv` or `*.tsv` file has the prompts in column `field`.
    - A `*.json` file has a list of strings, or of objects with the prompt under `field`.

    All files of a folder must have the same format. A column or a JSON list is copied once into `cache_folder`
    (default: the user's cache folder), so that a single prompt can be read without the others. All texts are checked
    once when the file is opened. Afterwards, each prompt takes 8 bytes of memory.

    Prompts without a visible character are left out. Prompts of more than `max_characters` characters are left out if
    `overlong` is "skip", and raise `UserError` if it is "refuse". With `deduplicate`, a prompt that repeats an
    earlier one is left out, even if the white space between the words differs.

    Raises `UserError` if the file is missing, empty or not UTF-8, if its content does not have the format that its name
    says, if it has no key or column `field`, or if it contains a prompt that no tokenizer can read.
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
    """Prompts that are written in the configuration itself. The set consists of `repeat` copies of the list `prompts`.

    Raises `UserError` for an empty list, for a `repeat` below 1, for a prompt that is not a string, and for a prompt
    that no tokenizer can read.
    """

    def __init__(self, prompts: Annotated[Sequence[Prompt], NotEmpty], repeat: Count = 1) -> None:
        self.prompts, self.repeat = list(prompts), repeat
        if not self.prompts or repeat < 1:
            empty = "the option `prompts` is an empty list; give at least one prompt"
            raise UserError(f"data: {f'repeat={repeat} must be at least 1' if self.prompts else empty}")
        for number, prompt in enumerate(self.prompts, start=1):
            flaw = flaw_of_given(prompt) if isinstance(prompt, str) else f"{prompt!r} is not a string; put it in quotes"
            if flaw:
                raise UserError(f"data: prompt {number} in the list of prompts: {flaw}")

    def __len__(self) -> int:
        return len(self.prompts) * self.repeat

    def __getitem__(self, index: int) -> str:
        """Return prompt number `index` of the repeated list. Raises IndexError if it does not exist."""
        if index >= len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return self.prompts[index % len(self.prompts)]
