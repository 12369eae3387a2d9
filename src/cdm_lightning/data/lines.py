"""Texts in files with one text on each line: as plain text, or in a JSON object under a field."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdm_lightning.errors import UserError
from cdm_lightning.files import open_regular

FILE = 1 << 48  # positions are file number * FILE + byte offset


class LineFiles:
    """The lines of UTF-8 files, one file after the other; with a `field`, the text in this field of each line's JSON object.

    Every access opens the file again, so loader workers may share this object.
    """

    def __init__(self, paths: Sequence[Path], field: str | None = None) -> None:
        self.paths, self.field = list(paths), field

    def scan(self) -> Iterator[tuple[int, str]]:
        """Yield (position, text) for each line; raise `UserError` for an unreadable file or a line without a text."""
        for number, path in enumerate(self.paths):
            try:
                yield from self._scan_file(path, number * FILE)
            except OSError as error:
                raise UserError(f"{path}: cannot read the prompt file ({error.strerror})") from error

    def read(self, position: int) -> str:
        """Return the text at `position`."""
        number, offset = divmod(position, FILE)
        with open_regular(self.paths[number]) as file:
            file.seek(offset)
            return self._parse(file.readline().decode("utf-8"))

    def place(self, position: int) -> str:
        """Return the place of a text as in "captions.txt, line 3"."""
        number, offset = divmod(position, FILE)
        with open_regular(self.paths[number]) as file:
            line = 1
            while file.tell() < offset and file.readline():
                line += 1
        return f"{self.paths[number]}, line {line}"

    def _scan_file(self, path: Path, position: int) -> Iterator[tuple[int, str]]:
        with open_regular(path) as file:
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
        line = line.strip("\ufeff \t\r\n")  # \ufeff is the byte order mark, which some editors write at the start
        if self.field is None or not line:
            return line
        prompt = json.loads(line)[self.field]
        if not isinstance(prompt, str):
            raise TypeError(f"{self.field} is not a text")
        return prompt
