"""Texts in files of lines: plain text, or JSON objects with the text under a field."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdm_lightning.errors import UserError

FILE = 1 << 48  # positions are file number * FILE + byte offset


class LineFiles:
    """The lines of UTF-8 files, one after the other; with a `field`, the text under it in the JSON object of each line.

    Every access opens its file afresh, so loader workers may share the object.
    """

    def __init__(self, paths: Sequence[Path], field: str | None = None) -> None:
        self.paths, self.field = list(paths), field

    def scan(self) -> Iterator[tuple[int, str]]:
        """(position, text) of each line; UserError for a file that cannot be read or a line without a text."""
        for number, path in enumerate(self.paths):
            try:
                yield from self._scan_file(path, number * FILE)
            except OSError as error:
                raise UserError(f"{path}: cannot read the prompt file ({error.strerror})") from error

    def read(self, position: int) -> str:
        """The text at `position`."""
        number, offset = divmod(position, FILE)
        with self.paths[number].open("rb") as file:
            file.seek(offset)
            return self._parse(file.readline().decode("utf-8"))

    def place(self, position: int) -> str:
        """ "captions.txt, line 3"."""
        number, offset = divmod(position, FILE)
        with self.paths[number].open("rb") as file:
            line = 1
            while file.tell() < offset and file.readline():
                line += 1
        return f"{self.paths[number]}, line {line}"

    def _scan_file(self, path: Path, position: int) -> Iterator[tuple[int, str]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield position, self._text(line, path, number)
                position += len(line)

    def _text(self, line: bytes, path: Path, number: int) -> str:
        try:
            return self._parse(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: the prompt file is not UTF-8; convert it first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number}: not a JSON object with a text in "{self.field}"') from error

    def _parse(self, line: str) -> str:
        line = line.strip("\ufeff \t\r\n")  # \ufeff: the mark that some editors put before the first line
        if self.field is None or not line:
            return line
        prompt = json.loads(line)[self.field]
        if not isinstance(prompt, str):
            raise TypeError(f"{self.field} is no text")
        return prompt
