"""Conditioning of prompts that come again and again, encoded once and kept in memory.

A few hundred captions in turn are met many times in a run: the text encoders would do the same work over and over.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import cast

import torch

from cdm_lightning.backbones.base import Conditioning, concat, select_rows

Encode = Callable[[Sequence[str]], Conditioning]
BATCH = 64  # prompts encoded at a time


class RememberedText:
    """`encode` with the results for the `prompts` kept, on the device where it gives them, from the first call on.

    All of them are encoded at that first call, in batches that depend on `prompts` alone: what a prompt is encoded to does
    not depend on what was asked for before, so a resumed run gets the same bits. Other prompts are encoded as they come,
    and so are all where the results would take more than `most_bytes` or differ in shape.
    """

    def __init__(self, encode: Encode, prompts: Iterable[str], most_bytes: int) -> None:
        self._encode, self._most_bytes = encode, most_bytes
        self._prompts = list(dict.fromkeys(["", *prompts]))
        self._place: dict[str, int] | None = None  # of each prompt in the table; None: not encoded yet
        self._table: Conditioning = {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts."""
        if self._place is None:
            self._fill()
        known = cast(dict[str, int], self._place)
        places = [known.get(prompt, -1) for prompt in prompts]
        return self._encode(prompts) if -1 in places else select_rows(self._table, torch.tensor(places))

    def forget(self) -> None:
        """Encode anew at the next call: the text encoders have moved to another device."""
        self._place, self._table = None, {}

    @torch.inference_mode(False)  # the first call may be that of a validation
    @torch.no_grad()
    def _fill(self) -> None:
        self._place = {}
        remaining, parts, used = iter(self._prompts), [], 0
        while batch := list(islice(remaining, BATCH)):
            parts.append(self._encode(batch))
            used += sum(value.nbytes for value in parts[-1].values())
            shapes = {tuple(value.shape[1:] for value in part.values()) for part in (parts[0], parts[-1])}
            if used * len(self._prompts) > self._most_bytes * BATCH * len(parts) or len(shapes) > 1:
                return
        self._table = concat(parts)
        self._place = {prompt: place for place, prompt in enumerate(self._prompts)}
