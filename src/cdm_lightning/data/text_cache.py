"""Conditioning of prompts from a text cache, so that training loads no text encoder.

The shards are mapped into memory; in memory itself there are 24 bytes a prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.data.text_shards import (
    COMMAND,
    DTYPES,
    KEY_TYPE,
    prompt_key,
    read_manifest,
    read_row,
    require_fingerprint,
    shard_keys,
    shard_paths,
)
from cdm_lightning.errors import UserError

SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class TextCacheSettings:
    """Where the text cache is and, for `cache_text`, how it is written; and what is kept in memory without one.

    `folder` None: no cache. A run of at most `remember_up_to` prompts, with repetitions, then keeps the conditioning of all
    of them if it takes no more than `remember_megabytes`. `dtype` is that of the files; `batch_size` prompts are encoded at
    a time; a shard holds about `shard_megabytes`. Training looks for all of its prompts before it begins if there are no
    more than `check_up_to`.
    Raises `UserError` for values out of range.
    """

    folder: str | Path | None = None
    dtype: str = "bfloat16"
    batch_size: int = 16
    shard_megabytes: float = 256
    check_up_to: int = 1_000_000
    remember_up_to: int = 20_000
    remember_megabytes: float = 256

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"text_cache.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch_size < 1 or self.shard_megabytes <= 0:
            raise UserError("text_cache: batch_size must be at least 1 and shard_megabytes more than 0")


class Texts(Protocol):
    """Prompts by number: a list of them, or a `data.prompts.Prompts`."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> str:
        """Prompt number `index`."""


class StoredText:
    """The cache in `folder`, which must be of text encoders with this `fingerprint` (`Backbone.text_fingerprint`).

    Raises `UserError` for a folder without a cache, a cache of other text encoders, and a shard that is not whole.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise UserError(
                f"{folder}: holds no text cache; make it with `{COMMAND}` and the arguments of the training command"
            )
        require_fingerprint(self.folder, manifest, fingerprint)
        self.manifest = manifest
        self.device = torch.device("cpu")
        self._paths = shard_paths(self.folder)
        keys = [shard_keys(path, manifest) for path in self._paths]
        self._starts = np.cumsum([0, *map(len, keys)])
        found = np.concatenate([np.empty(0, KEY_TYPE), *keys])
        self._order = np.argsort(found, kind="stable")
        self._keys = found[self._order]

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self._keys)

    def __contains__(self, prompt: str) -> bool:
        return self._find(prompt) is not None

    def to(self, device: torch.device) -> None:
        """Give conditioning on this device from here on."""
        self.device = torch.device(device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts as the text encoders gave it, in their dtype; UserError for one that is not there."""
        distinct = list(dict.fromkeys(prompts))
        rows = [self._unconditional if prompt == "" else self._row(prompt) for prompt in distinct]
        cond = {
            name: torch.stack([row[name] for row in rows]).to(self.device).to(self.manifest.given(name))
            for name in self.manifest.tensors
        }
        if len(distinct) == len(prompts):
            return cond
        which = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        return {name: value.index_select(0, which) for name, value in cond.items()}

    def require(self, sets: Mapping[str, Texts], check_up_to: int) -> None:
        """UserError, with the number and the first of them, if prompts of these named sets are not in the cache.

        With more than `check_up_to` prompts in all they are looked for when they are used.
        """
        if "" not in self:
            raise UserError(f"{self.folder}: the text cache lacks the empty prompt; run `{COMMAND}` again, it goes on")
        if sum(map(len, sets.values())) > check_up_to:
            return
        for name, prompts in sets.items():
            missing = [number for number in range(len(prompts)) if prompts[number] not in self]
            if missing:
                raise self._not_there(
                    prompts[missing[0]], f"{len(missing):,} of the {len(prompts):,} {name} prompts are"
                )

    @cached_property
    def _unconditional(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._row("").items()}  # used in every iteration

    def _row(self, prompt: str) -> dict[str, Tensor]:
        found = self._find(prompt)
        if found is None:
            raise self._not_there(prompt, "a prompt is")
        shard = int(np.searchsorted(self._starts, found, side="right")) - 1
        return read_row(self._paths[shard], self.manifest, found - int(self._starts[shard]))

    def _find(self, prompt: str) -> int | None:
        """Number of the prompt, counted through all shards."""
        key = np.frombuffer(prompt_key(prompt), KEY_TYPE)[0:1]
        place = int(np.searchsorted(self._keys, key)[0])
        if place == len(self._keys) or self._keys[place : place + 1] != key:
            return None
        return int(self._order[place])

    def _not_there(self, prompt: str, what: str) -> UserError:
        shown = prompt if len(prompt) <= SHOWN else prompt[:SHOWN] + "..."
        return UserError(
            f"{self.folder}: {what} not in the text cache, such as {shown!r}; "
            f"run `{COMMAND}` with the arguments of the training command, it adds what is missing"
        )
