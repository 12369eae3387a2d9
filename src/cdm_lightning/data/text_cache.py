"""A text cache is a folder with the encoded prompts of a run. Training reads it instead of loading a text encoder.

The encodings are on the disk in files called shards, and an encoding is read whenever its prompt is used. In memory,
the opened cache takes only 24 bytes for each prompt: a key, and the place where the encoding is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cdm_lightning.backbones.base import Conditioning, select_rows
from cdm_lightning.core.transfer import send
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
from cdm_lightning.kinds import BatchSize, Count, CountOrNone, DtypeName, FolderToRead, Megabytes, Positive

SHOWN = 60  # the number of characters of a prompt that a message shows


@dataclass(frozen=True)
class TextCacheSettings:
    """The options `text_cache.*`, which say where encoded prompts are kept: in a folder, in memory, or nowhere.

    `folder` is the cache that the command `cache_text` writes and training reads. `dtype` is the dtype of the cache's
    floating-point tensors. The command encodes `batch_size` prompts at a time and writes files of about
    `shard_megabytes` MB. If the run has at most `check_up_to` prompts, all of them are looked up in the cache
    before the training begins. Otherwise, the run ends with an error when it uses a prompt that the cache lacks.

    If `folder` and `encode_ahead` are None, the encodings are kept in memory, provided that the run has at most
    `remember_up_to` prompts and that their encodings take at most `remember_megabytes` MB. `check_up_to` and
    `remember_up_to` are compared with the number of prompts, in which a repeated prompt counts each time.

    If `folder` is None and `encode_ahead` is a number n, the prompts of n iterations are encoded in advance. The
    text encoders then rest in host memory until the prompts of the next n iterations are needed. The encodings of other
    prompts, such as those of validation, are kept up to `remember_megabytes` MB (see `data.text_ahead.TextAhead`).

    Raises `UserError` for a value out of its range.
    """

    folder: FolderToRead | None = None
    dtype: DtypeName = "bfloat16"
    batch_size: BatchSize = 16
    shard_megabytes: Positive = 256
    check_up_to: CountOrNone = 1_000_000
    remember_up_to: CountOrNone = 20_000
    remember_megabytes: Megabytes = 256
    encode_ahead: Count | None = None

    def __post_init__(self) -> None:
        if self.encode_ahead is not None and self.encode_ahead < 1:
            raise UserError(f"text_cache.encode_ahead={self.encode_ahead} must be at least 1, or null")
        if self.dtype not in DTYPES:
            raise UserError(f"text_cache.dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.batch_size < 1 or self.shard_megabytes <= 0:
            raise UserError(
                f"text_cache.{f'batch_size={self.batch_size} must be at least 1' if self.batch_size < 1 else ''}"
                f"{f'shard_megabytes={self.shard_megabytes} must be above 0' if self.batch_size >= 1 else ''}"
            )


class Texts(Protocol):
    """A sequence of prompts that has `len` and indexing, such as a list of strings or a `data.prompts.Prompts`."""

    def __len__(self) -> int:
        """Return the number of prompts."""

    def __getitem__(self, index: int, /) -> str:
        """Return prompt number `index`."""


class StoredText:
    """An opened text cache. It returns the encodings of prompts (conditioning), as `Backbone.encode_prompts` does.

    `fingerprint` is the `text_fingerprint` of the run's backbone. Raises `UserError` if `folder` has no cache,
    if other text encoders made the cache, or if a shard of the cache is incomplete, damaged or from another cache.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise UserError(
                f"{folder} has no text cache; run `{COMMAND}` with the arguments of the training command to make it"
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
        """Return the number of prompts in the cache."""
        return len(self._keys)

    def __contains__(self, prompt: str) -> bool:
        return self._find(prompt) is not None

    def to(self, device: torch.device) -> None:
        """Set the device of all encodings that are returned from now on."""
        self.device = torch.device(device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the encodings of B prompts: tensors (B, ...) by name, in the dtype of the text encoders.

        Raises `UserError` if a prompt is not in the cache, or if its stored encoding is damaged.
        """
        distinct = list(dict.fromkeys(prompts))
        rows = [self._unconditional if prompt == "" else self._row(prompt) for prompt in distinct]
        cond = {
            name: send(torch.stack([row[name] for row in rows]), self.device).to(self.manifest.given(name))
            for name in self.manifest.tensors
        }
        if len(distinct) == len(prompts):
            return cond
        return select_rows(cond, torch.tensor([distinct.index(prompt) for prompt in prompts]))

    def require(self, sets: Mapping[str, Texts], check_up_to: int) -> None:
        """Raise `UserError` if the cache lacks the empty prompt or a prompt of `sets`.

        `sets` maps the name of a set, such as "training", to its prompts. The message says how many prompts of a set
        are missing, and shows one of them. If the sets together have more than `check_up_to` prompts, only the empty
        prompt is looked up here, and `encode` raises `UserError` later for a missing prompt.
        """
        if "" not in self:
            raise UserError(f"{self.folder}: the text cache lacks the empty prompt; run `{COMMAND}` again to add it")
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
        return {name: value.clone() for name, value in self._row("").items()}  # in memory: every iteration uses it

    def _row(self, prompt: str) -> dict[str, Tensor]:
        found = self._find(prompt)
        if found is None:
            raise self._not_there(prompt, "a prompt is")
        shard = int(np.searchsorted(self._starts, found, side="right")) - 1
        return read_row(self._paths[shard], self.manifest, found - int(self._starts[shard]))

    def _find(self, prompt: str) -> int | None:
        """Return the number of the prompt, counted through all shards, or None if it is not in the cache."""
        key = np.frombuffer(prompt_key(prompt), KEY_TYPE)[0:1]
        place = int(np.searchsorted(self._keys, key)[0])
        if place == len(self._keys) or self._keys[place : place + 1] != key:
            return None
        return int(self._order[place])

    def _not_there(self, prompt: str, what: str) -> UserError:
        shown = prompt if len(prompt) <= SHOWN else prompt[:SHOWN] + "..."
        return UserError(
            f"{self.folder}: {what} not in the text cache, such as {shown!r}; "
            f"run `{COMMAND}` with the arguments of the training command to add the missing prompts"
        )
