"""Select the texts of a source that become prompts. Blank, over-long and repeated texts are left out and counted."""

import hashlib
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cdm_lightning.errors import UserError

POLICIES = ("skip", "refuse")
INVISIBLE = frozenset(("Cc", "Cf", "Cn", "Mn", "Zl", "Zp", "Zs"))  # Unicode categories of invisible characters
FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that Unicode defines as blank
KEY_BYTES = 16  # of a prompt's hash; the chance that two of 10 million prompts have the same hash is below 1e-24


class TextSource(Protocol):
    """A source of texts, such as a file.

    Each text has a position, an int64. `read` returns the text at a position without reading the other texts.
    """

    def scan(self) -> Iterator[tuple[int, str]]:
        """Yield (position, text) for all texts in order. Raises `UserError` for a text that cannot be read."""

    def read(self, position: int) -> str:
        """Return the text at `position`, which `scan` has yielded."""

    def place(self, position: int) -> str:
        """Return where the text at `position` is, for messages, such as "captions.txt, line 3"."""


@dataclass(frozen=True)
class Counts:
    """How many texts a `Selection` kept, and how many it left out for each reason.

    `max_characters` is the number of characters above which a text counts as over-long.
    """

    kept: int
    blank: int
    overlong: int
    repeated: int
    max_characters: int

    @property
    def left_out(self) -> str:
        """The numbers of left-out texts, such as "3 blank, 1 over 10,000 characters", or "" if no text was left out."""
        over = f"over {self.max_characters:,} characters"
        named = ((self.blank, "blank"), (self.overlong, over), (self.repeated, "repeated"))
        return ", ".join(f"{count:,} {name}" for count, name in named if count)


@dataclass(frozen=True)
class Selection:
    """The rules by which texts are kept as prompts.

    Blank texts are left out. Texts of more than `max_characters` characters are left out if `overlong` is "skip", and
    raise `UserError` if it is "refuse". With `deduplicate`, a text that repeats an earlier one is left out, even if the
    white space between the words differs.

    Raises `UserError` for a `max_characters` below 1, and for an `overlong` other than "skip" and "refuse".
    """

    max_characters: int
    overlong: str
    deduplicate: bool

    def __post_init__(self) -> None:
        if self.max_characters < 1 or self.overlong not in POLICIES:
            raise UserError(
                f"data: {f'max_characters={self.max_characters} must be at least 1' if self.max_characters < 1 else ''}"
                f"{f'overlong={self.overlong} must be skip or refuse' if self.max_characters >= 1 else ''}"
            )

    def select(self, source: TextSource, name: str) -> tuple[Tensor, Counts]:
        """Return the positions (n,) int64 of the texts that are kept, in order, and the `Counts` of all texts.

        `name` is the name of the source. Raises `UserError` for a text that cannot be read from `source`, for a text
        that no tokenizer can read, and for an over-long text if `overlong` is "refuse".
        """
        positions, keys, blank, overlong = array("q"), bytearray(), 0, 0
        for position, text in source.scan():
            text = text.strip()
            if not is_visible(text):
                blank += 1
            elif len(text) > self.max_characters:
                overlong += 1
                if self.overlong == "refuse":  # finding a place reads the file from its start: only for a message
                    raise self._overlong(source.place(position), len(text))
            else:
                if flaw := flaw_of(text):
                    raise UserError(f"{source.place(position)}: {flaw}")
                positions.append(position)
                if self.deduplicate:
                    keys += hashlib.blake2b(" ".join(text.split()).encode(), digest_size=KEY_BYTES).digest()
        found = torch.frombuffer(positions, dtype=torch.int64) if positions else torch.empty(0, dtype=torch.int64)
        if self.deduplicate:
            found = found[torch.from_numpy(first_occurrences(keys))]
        repeated = len(positions) - len(found)
        return found, Counts(len(found), blank, overlong, repeated, self.max_characters)

    def _overlong(self, place: str, length: int) -> UserError:
        return UserError(
            f"{place}: the prompt has {length:,} characters, more than max_characters={self.max_characters}; "
            "shorten it or set overlong=skip"
        )


def is_visible(text: str) -> bool:
    """Return whether a text has a visible character.

    Spaces, control characters, zero-width characters, combining marks and Unicode fillers are not visible.
    """
    return any(unicodedata.category(c) not in INVISIBLE and c not in FILLERS for c in text)


def flaw_of_given(text: str) -> str | None:
    """Return why a prompt of the command line or of a list cannot be used, and how to repair it, or None.

    In addition to `flaw_of`, it must have a visible character, unless it is the empty prompt "".
    """
    if text and not is_visible(text):
        return "the prompt has no visible character; write it anew, or write '' for the empty prompt"
    return flaw_of(text)


def flaw_of(text: str) -> str | None:
    """Return a message that says why no tokenizer can read a text and how to repair it, or None if nothing is wrong.

    Tokenizers cannot read NUL characters and lone surrogates. A lone surrogate is half of a character, for example from
    a JSON text that was cut inside an emoji.
    """
    if "\0" in text:
        return "the prompt contains a NUL character; if the file is UTF-16, convert it to UTF-8"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the prompt contains half a character (\\u{ord(text[error.start]):04x}); complete or remove it"
    return None


def first_occurrences(keys: bytes | bytearray) -> np.ndarray:
    """Return the indices (n,) of those keys that do not repeat an earlier key, in increasing order.

    `keys` contains keys of 16 bytes, one after the other. The first key has index 0.
    """
    pairs = np.frombuffer(keys, dtype="<u8").reshape(-1, 2)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # the sort is stable: of equal keys the first comes first
    ordered = pairs[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.sort(order[new])
