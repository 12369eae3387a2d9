"""Texts in files with one text on each line. A line is the text itself, or a JSON object that contains it."""

import json
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from cdm_lightning.data.unchanged import FileState
from cdm_lightning.errors import UserError
from cdm_lightning.files import open_regular

FILE = 1 << 48  # positions are file number * FILE + byte offset
LONGEST_LINE = 1 << 24  # characters; a longer line cannot be a prompt, and reading it would fill the memory
BYTE_ORDER_MARK = "\ufeff"  # some editors write it at the start of a file


class LineFiles:
    r"""The texts in UTF-8 files, one on each line.

    With `field`, each line is a JSON object, and the text is the string under the key `field`. With `whole`, each line
    is a JSON object, and the text is the whole line. With neither, each line is plain text.

    Lines of plain text end where `str.splitlines` ends them, also at U+0085 and U+2028. In a JSON object these
    characters may occur inside a string, so lines with JSON objects end only at `\n`, `\r\n` and `\r`.

    `scan` and `read` open a file anew at each call, so loader workers can share this object. `read` raises `UserError`
    if the file has changed since `scan`.
    """

    def __init__(self, paths: Sequence[Path], field: str | None = None, whole: bool = False) -> None:
        self.paths, self.field = list(paths), field
        self._is_text = field is None and not whole
        self._states: dict[int, FileState] = {}  # of the files that have been scanned, by number

    def scan(self) -> Iterator[tuple[int, str]]:
        """Yield (position, text) for each line. `read(position)` returns the same text later.

        Raises `UserError` for a file that cannot be read or is not UTF-8, and for a line of a JSON Lines file that has no
        string under the key `field`.
        """
        for number, path in enumerate(self.paths):
            try:
                with opened(path) as file:
                    self._states[number] = FileState.of(file.fileno())
                    for line, (offset, text) in enumerate(self._lines(file, path), start=1):
                        yield number * FILE + offset, self._checked(text, path, line)
                    self._states[number].require(file.fileno(), path)  # else it is still being written
            except OSError as error:
                raise UserError(f"{path}: cannot read the prompt file ({error.strerror}); correct the path") from error

    def read(self, position: int) -> str:
        """Return the text at a position that `scan` yielded. Raises `UserError` if the file has changed since then."""
        number, offset = divmod(position, FILE)
        path = self.paths[number]
        try:
            with opened(path) as file:
                file.seek(offset)
                line = file.readline(LONGEST_LINE)
                if number in self._states:
                    self._states[number].require(file.fileno(), path)
        except OSError as error:
            raise UserError(f"{path}: cannot read the prompt file ({error.strerror}); correct the path") from error
        return self._parse(self._pieces(line)[0] if line else line)

    def place(self, position: int) -> str:
        """Return where the text at `position` is, for messages, such as "captions.txt, line 3".

        This is slow for a long file, because the lines are counted from its start.
        """
        number, offset = divmod(position, FILE)
        path = self.paths[number]
        with opened(path) as file:
            line = next((n for n, (found, _) in enumerate(self._lines(file, path), start=1) if found >= offset), 1)
        return f"{path}, line {line}"

    def _lines(self, file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
        """Yield (byte offset, line) for all lines.

        Raises `UserError` for bytes that are not UTF-8 and for a very long line.
        """
        offset = number = 0
        while line := file.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                raise UserError(
                    f"{path}, line {number + 1}: the line has over {LONGEST_LINE:,} characters; write one prompt on each line"
                )
            for piece in self._pieces(line):
                number += 1
                try:
                    size = len(piece) if piece.isascii() else len(piece.encode())
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"{path}, line {number}: the prompt file is not UTF-8; convert it to UTF-8"
                    ) from error
                yield offset, piece
                offset += size

    def _pieces(self, line: str) -> list[str]:
        return line.splitlines(keepends=True) if self._is_text else [line]

    def _checked(self, line: str, path: Path, number: int) -> str:
        try:
            return self._parse(line)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f'{path}, line {number}: not a JSON object with a string under "{self.field}"; correct the line, or set '
                "the option `field` to the key of the prompts"
            ) from error

    def _parse(self, line: str) -> str:
        line = line.strip(BYTE_ORDER_MARK + " \t\r\n")
        if self.field is None or not line:
            return line
        prompt = json.loads(line)[self.field]
        if not isinstance(prompt, str):
            raise TypeError(f"{self.field} is not a string")
        return prompt


def opened(path: Path) -> TextIO:
    r"""Open a UTF-8 file for reading. The returned file can `seek` to the byte offset of any character.

    Line ends (`\n`, `\r\n`, `\r`) are not translated. Bytes that are not UTF-8 become lone surrogates without an error.
    """
    return TextIOWrapper(open_regular(path), "utf-8", errors="surrogateescape", newline="")
