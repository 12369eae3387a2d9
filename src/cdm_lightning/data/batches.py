"""Which prompts make up batch n: a function of (seed, n), so that a run can go on anywhere without a saved position."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cdm_lightning.core.rng import permutation

Order = Callable[[int], int]  # position in the endless stream of all ranks -> number of the prompt


PADDING = -1  # key of a draw that is there only to be computed


class PromptBatch(NamedTuple):
    """Prompts with the number that keys their random draws.

    `indices` (B,) int64 on the CPU: in training the slot of each sample within the global batch (over all ranks), in
    validation the number of the prompt in its file. `together` are the batches of all iterations whose rollouts are made
    at once, in their order and with this one among them: told with the first of them that is read, else empty.
    """

    prompts: list[str]
    indices: Tensor
    together: tuple["PromptBatch", ...] = ()

    def split(self, count: int) -> list["PromptBatch"]:
        """The batch in `count` parts of sizes that differ by 1 at most, or in single samples if there are fewer."""
        parts = spans(len(self.prompts), count)
        return [PromptBatch(self.prompts[span], self.indices[span]) for span in parts]


def spans(size: int, count: int) -> list[slice]:
    """0..size-1 in `count` runs whose lengths differ by 1 at most, or in single numbers if there are fewer."""
    edges = [size * n // count for n in range(count + 1)]
    return [slice(first, end) for first, end in pairwise(edges) if end > first]


class Draw(NamedTuple):
    """One sample asked of the loader: the prompt's number in its file, the number that keys its random draws, its batch's."""

    prompt: int
    key: int
    batch: int = 0


class DrawnPrompts(Dataset):
    """View of a prompt data set that is addressed by `Draw`, so that each prompt travels with its key."""

    def __init__(self, prompts: Dataset) -> None:
        self.prompts = prompts

    def __getitem__(self, draw: Draw) -> tuple[str, int, int]:
        return self.prompts[draw.prompt], draw.key, draw.batch


class ShuffledEpochs:
    """The order that deals out the prompts 0..size-1 in epochs, each in its own random order: a function of `seed`, `key`."""

    def __init__(self, size: int, seed: int, *key: int) -> None:
        self.size, self.seed, self.key = size, seed, key
        self._epoch, self._numbers = 0, permutation(size, seed, "prompt_order", 0, *key)

    def __call__(self, position: int) -> int:
        """The prompt at `position`, counted from 0."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._numbers = epoch, permutation(self.size, self.seed, "prompt_order", epoch, *self.key)
        return int(self._numbers[place])


class EndlessBatches(Sampler):
    """Batches `start`, `start + 1`, ... without end, each a list of `batch_size` draws of this rank.

    `together(n)` are the batches whose rollouts are made with that of batch n: the first of them that is read brings the
    draws of the others, after its own.

    The `size` prompts come in `order`, by default in shuffled epochs; a batch may span two of them. Together the ranks
    take `world_size * batch_size` consecutive prompts a batch, so the global batch is the same for each split of it
    over ranks.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        order: Order | None = None,
        together: Callable[[int], range] | None = None,
    ) -> None:
        self.batch_size, self.start, self.rank, self.world_size = batch_size, start, rank, world_size
        self.prompt_at, self.together = order or ShuffledEpochs(size, seed), together

    def __iter__(self) -> Iterator[list[Draw]]:
        number = self.start
        while True:
            group = self.together(number) if self.together else range(number, number + 1)
            others = [other for other in group if other != number] if number in (self.start, group.start) else []
            yield [draw for one in (number, *others) for draw in self.batch(one)]
            number += 1

    def batch(self, number: int) -> list[Draw]:
        """Draws of batch `number`, counted from 0; the key of each is its slot in the global batch."""
        first = number * self.batch_size * self.world_size
        slots = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [Draw(self.prompt_at(first + slot), slot, number) for slot in slots]


def evaluation_batches(size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[Draw]]:
    """This rank's share of the first `size` prompts, in their order, in batches of at most `batch_size`.

    Each draw is keyed by its own number. All ranks have equally many batches, since they may share one network; where a
    rank has nothing left its batch is a single draw keyed `PADDING`, which counts for nothing.
    """
    first, end = size * rank // world_size, size * (rank + 1) // world_size
    longest = -(-size // world_size)
    batches = []
    for begin in range(0, longest, batch_size):
        numbers = range(first + begin, min(first + begin + batch_size, end))
        batches.append([Draw(number, number) for number in numbers] or [Draw(0, PADDING)])
    return batches


def collate(samples: list[tuple[str, int, int]]) -> PromptBatch:
    """Samples of the loader as the `PromptBatch` that the first of them belongs to."""
    batches = {number: [] for number in dict.fromkeys(number for *_, number in samples)}
    for prompt, key, number in samples:
        batches[number].append((prompt, key))
    whole = {number: _batch(drawn) for number, drawn in batches.items()}
    own = whole[samples[0][-1]]
    return own._replace(together=tuple(whole[number] for number in sorted(whole))) if len(whole) > 1 else own


def _batch(drawn: list[tuple[str, int]]) -> PromptBatch:
    prompts, keys = zip(*drawn, strict=True)
    return PromptBatch(list(prompts), torch.tensor(keys, dtype=torch.int64))
