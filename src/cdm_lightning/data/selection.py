"""Which texts of a source are prompts: not the blank, the over-long and the repeated ones, and how many those are."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cdm_lightning.errors import UserError

POLICIES = ("skip", "refuse")
KEY_BYTES = 16  # of the hash that tells prompts apart: a clash among 10 million is less likely than 1e-24


class TextSource(Protocol):
    """Texts that lie somewhere, each at a position of its own (64 bits)."""

    def scan(self) -> Iterator[tuple[int, str]]:
        """(position, text) of all texts in order; UserError for what cannot be read."""

    def read(self, position: int) -> str:
        """The text at a position that `scan` gave."""

    def place(self, position: int) -> str:
        """Where that is, for messages: "captions.txt, line 3"."""


@dataclass(frozen=True)
class Counts:
    """How many texts are prompts, and how many were left out for each reason."""

    kept: int
    blank: int
    overlong: int
    repeated: int
    max_characters: int

    @property
    def left_out(self) -> str:
        """ "3 blank, 1 over 10,000 characters"; empty if none."""
        over = f"over {self.max_characters:,} characters"
        named = ((self.blank, "blank"), (self.overlong, over), (self.repeated, "repeated"))
        return ", ".join(f"{count:,} {name}" for count, name in named if count)


@dataclass(frozen=True)
class Selection:
    """The rules. Raises `UserError` for a limit below 1 or an unknown policy."""

    max_characters: int
    overlong: str
    deduplicate: bool

    def __post_init__(self) -> None:
        if self.max_characters < 1 or self.overlong not in POLICIES:
            raise UserError(
                f"data: max_characters must be at least 1 and overlong {' or '.join(POLICIES)}, "
                f"got {self.max_characters} and {self.overlong!r}"
            )

    def select(self, source: TextSource, name: str) -> tuple[Tensor, Counts]:
        """Positions (n,) int64 of the prompts of `source`, called `name`, in order, and the counts."""
        positions, keys, blank, overlong = array("q"), bytearray(), 0, 0
        for position, text in source.scan():
            text = text.strip()
            if not text:
                blank += 1
            elif len(text) > self.max_characters:
                overlong += 1
                self._refuse_overlong(source.place(position), len(text))
            else:
                positions.append(position)
                if self.deduplicate:
                    keys += hashlib.blake2b(" ".join(text.split()).encode(), digest_size=KEY_BYTES).digest()
        found = torch.frombuffer(positions, dtype=torch.int64) if positions else torch.empty(0, dtype=torch.int64)
        if self.deduplicate:
            found = found[torch.from_numpy(first_occurrences(keys))]
        repeated = len(positions) - len(found)
        return found, Counts(len(found), blank, overlong, repeated, self.max_characters)

    def _refuse_overlong(self, place: str, length: int) -> None:
        if self.overlong == "refuse":
            raise UserError(
                f"{place}: a prompt of {length:,} characters, more than max_characters={self.max_characters}; "
                "shorten it or set overlong=skip"
            )


def first_occurrences(keys: bytes | bytearray) -> np.ndarray:
    """Numbers, increasing, of those keys of 16 bytes each that equal no earlier one."""
    pairs = np.frombuffer(keys, dtype="<u8").reshape(-1, 2)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # stable: among equal keys the first comes first
    ordered = pairs[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.sort(order[new])
