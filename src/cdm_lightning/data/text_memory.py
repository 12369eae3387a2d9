"""Keep the encodings of prompts in memory, so that each prompt is encoded only once.

This is for runs that have few prompts and use each of them many times.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import cast

import torch

from cdm_lightning.backbones.base import Conditioning, concat, select_rows

Encode = Callable[[Sequence[str]], Conditioning]
BATCH = 64  # prompts encoded at a time


class RememberedText:
    """Keeps the encodings of `prompts` and of the empty prompt in memory, so that each is computed only once.

    The parameter `encode` is the function that computes encodings. The first call of the method `encode` passes
    `prompts` and the empty prompt to this function, always in the same batches. Therefore a resumed run gets
    bit-identical encodings, whichever prompts it uses first. The encodings stay on the device on which the function
    returned them.

    If the method `encode` is called with a prompt that is not kept, it passes all prompts of this call to the function.
    If the encodings would take more than `most_bytes`, or if their shapes differ between prompts, none are kept.
    """

    def __init__(self, encode: Encode, prompts: Iterable[str], most_bytes: int) -> None:
        self._encode, self._most_bytes = encode, most_bytes
        self._prompts = list(dict.fromkeys(["", *prompts]))
        self._place: dict[str, int] | None = None  # the row of each prompt in the table; None if nothing is encoded yet
        self._table: Conditioning = {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the encodings of B prompts: tensors (B, ...) by name.

        They equal the result of the constructor's parameter `encode` for these prompts.
        """
        if self._place is None:
            self._fill()
        known = cast(dict[str, int], self._place)
        places = [known.get(prompt, -1) for prompt in prompts]
        return self._encode(prompts) if -1 in places else select_rows(self._table, torch.tensor(places))

    def forget(self) -> None:
        """Drop all encodings that are kept. The next call of `encode` computes them again.

        Call this after the text encoders have moved to another device, so that the encodings are on that device too.
        """
        self._place, self._table = None, {}

    @torch.inference_mode(False)  # the first call may come from validation, in inference mode
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
