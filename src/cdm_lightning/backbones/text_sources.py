"""Interfaces of the two stores from which a backbone can take text conditioning: a text cache and a text memory."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Conditioning = dict[str, Tensor]  # a network's inputs except x and sigma, batch first; the backbone names them


class TextCache(Protocol):
    """Text conditioning that was encoded earlier and is stored on disk (see `data.text_cache.StoredText`)."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text conditioning of B prompts. Raises `UserError` for a prompt that is not in the cache."""

    def to(self, device: torch.device) -> None:
        """Set the device on which `encode` returns conditioning from now on."""


class TextMemory(Protocol):
    """Text conditioning in memory, so that prompts are encoded only once (see `data.text_memory.RememberedText`)."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text conditioning of B prompts."""

    def forget(self) -> None:
        """Drop all conditioning in memory. The next call of `encode` encodes the prompts again."""
