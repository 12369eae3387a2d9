"""Encode the prompts of several iterations in advance. During these iterations, the text encoders rest in host memory.

This is for runs without a text cache, if the training needs the GPU memory that the text encoders would take.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.core.transfer import Resting, send, to_host

Encode = Callable[[Sequence[str]], Conditioning]


class _Kept(NamedTuple):
    """A tensor in host memory, and the dtype in which it is returned."""

    values: Tensor
    dtype: torch.dtype


class TextAhead:
    """A wrapper of the function `encode`. It encodes the next iterations' batches in advance and keeps the results.

    - `coming()` returns the batches of the next iterations. Each batch contains the prompts that the training will pass
      to one call of the method `encode`.
    - `encoders()` returns the text encoders. They are on their device only while prompts are encoded, and otherwise
      rest in host memory (`core.transfer.Resting`).
    - `most_bytes` limits the memory for the encodings of batches that `coming()` does not return, such as those of
      validation. The encoding of the empty prompt is always kept.

    Each batch is encoded separately, so its encodings are bit-identical to those without this wrapper. All encodings
    are kept in pinned host memory. The method `encode` copies them to the device without making the host wait.
    """

    def __init__(
        self,
        encode: Encode,
        coming: Callable[[], Iterable[Sequence[str]]],
        encoders: Callable[[], Sequence[nn.Module]],
        most_bytes: int,
    ) -> None:
        self._encode, self._coming, self._encoders, self._most_bytes = encode, coming, encoders, most_bytes
        self._resting: Resting | None = None  # None: the encoders are on their device
        self._device = torch.device("cpu")
        self._ahead: dict[tuple[str, ...], dict[str, _Kept]] = {}
        self._others: dict[tuple[str, ...], dict[str, _Kept]] = {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the encodings of B prompts: tensors (B, ...) by name, equal to those of the wrapped function."""
        key = tuple(prompts)
        found = self._ahead.get(key, self._others.get(key))
        if found is None:
            found = self._encode_missing(key)
        return {name: send(kept.values, self._device).to(kept.dtype) for name, kept in found.items()}

    def forget(self) -> None:
        """Drop all encodings that are kept. Call this after the text encoders have moved to another device."""
        self._ahead, self._others, self._resting = {}, {}, None

    @torch.inference_mode(False)  # the first call may come from validation, in inference mode
    @torch.no_grad()
    def _encode_missing(self, key: tuple[str, ...]) -> dict[str, _Kept]:
        coming = dict.fromkeys(tuple(batch) for batch in self._coming())
        if self._resting is None:
            self._resting = Resting(self._encoders())
        with self._resting.on_device():
            if key in coming:
                self._ahead = {}  # frees the memory of the batches that were used
                self._ahead = {batch: self._kept(batch) for batch in coming}
                if ("",) not in self._others:  # it is asked for beside each batch
                    self._others[("",)] = self._kept(("",))
                return self._ahead[key]
            found = self._kept(key)
        if not any(key) or self._bytes_of_others() + _bytes(found) <= self._most_bytes:
            self._others[key] = found
        return found

    def _kept(self, batch: tuple[str, ...]) -> dict[str, _Kept]:
        encoded = self._encode(list(batch))
        self._device = next((value.device for value in encoded.values()), self._device)
        return {name: _Kept(to_host(_narrowed(value)), value.dtype) for name, value in encoded.items()}

    def _bytes_of_others(self) -> int:
        return sum(_bytes(kept) for batch, kept in self._others.items() if any(batch))


def _bytes(kept: dict[str, _Kept]) -> int:
    return sum(each.values.nbytes for each in kept.values())


def _narrowed(values: Tensor) -> Tensor:
    """Return float32 values in bfloat16 if nothing is lost, as with encoders that compute in bfloat16; others unchanged."""
    if values.dtype != torch.float32:
        return values
    narrow = values.to(torch.bfloat16)
    return narrow if torch.equal(narrow.float(), values) else values
