"""Prompts as data sets: the lines of a file, without holding them in memory, or a few given ones."""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from cdm_lightning.errors import UserError


class PromptFile(Dataset):
    """The prompts of a UTF-8 file, one a line: plain text, or in a file `*.jsonl` the `field` of each object.

    Blank lines are skipped and counted in `blank_lines`. The whole file is checked once, when it is opened;
    afterwards only the byte offset of each prompt is kept, and every access opens the file afresh, so loader workers
    may share the object.

    Raises `UserError` for a file that is missing, empty or not UTF-8, for a jsonl line without the field, and for a
    `field` that is given for a plain text file.
    """

    def __init__(self, path: str | Path, field: str | None = None) -> None:
        self.path = Path(path)
        self.field = (field or "prompt") if self.path.suffix == ".jsonl" else None
        if field is not None and self.field is None:
            raise UserError(f"{self.path}: `field: {field}` needs a .jsonl file; a text file holds one prompt a line")
        self.offsets, self.blank_lines = self._scan()
        if not self.offsets:
            raise UserError(f"{self.path}: the prompt file holds no prompt; write one a line")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> str:
        """Prompt number `index`, counted without the blank lines."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return self._parse(file.readline().decode("utf-8"))

    def _scan(self) -> tuple[array, int]:
        offsets, blank, position = array("q"), 0, 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if self._check(line, number):
                        offsets.append(position)
                    else:
                        blank += 1
                    position += len(line)
        except OSError as error:
            raise UserError(f"{self.path}: cannot read the prompt file ({error.strerror})") from error
        return offsets, blank

    def _check(self, line: bytes, number: int) -> bool:
        """Whether line `number` holds a prompt; one that holds no text of the right form is refused."""
        try:
            text = line.decode("utf-8")
            return bool(text.strip("\ufeff \t\r\n")) and bool(self._parse(text))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}, line {number}: the prompt file is not UTF-8; convert it first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{self.path}, line {number}: not a JSON object with a text in "{self.field}"') from error

    def _parse(self, line: str) -> str:
        line = line.lstrip("\ufeff")  # the mark that some editors put before the first line
        if self.field is None:
            return line.strip()
        prompt = json.loads(line)[self.field]
        if not isinstance(prompt, str):
            raise TypeError(f"{self.field} is no text")
        return prompt.strip()


class PromptList(Dataset):
    """A few prompts given in the configuration, `repeat` times over; `UserError` if there are none."""

    def __init__(self, prompts: Sequence[str], repeat: int = 1) -> None:
        self.prompts, self.repeat = list(prompts), repeat
        if not self.prompts or repeat < 1:
            raise UserError("a prompt list needs at least one prompt and repeat of at least 1")

    def __len__(self) -> int:
        return len(self.prompts) * self.repeat

    def __getitem__(self, index: int) -> str:
        """Prompt number `index`."""
        return self.prompts[index % len(self.prompts)]
