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
    validation the number of the prompt in its file.
    """

    prompts: list[str]
    indices: Tensor

    def split(self, count: int) -> list["PromptBatch"]:
        """The batch in `count` parts of sizes that differ by 1 at most, or in single samples if there are fewer."""
        parts = spans(len(self.prompts), count)
        return [self._replace(prompts=self.prompts[span], indices=self.indices[span]) for span in parts]


def spans(size: int, count: int) -> list[slice]:
    """0..size-1 in `count` runs whose lengths differ by 1 at most, or in single numbers if there are fewer."""
    edges = [size * n // count for n in range(count + 1)]
    return [slice(first, end) for first, end in pairwise(edges) if end > first]


class Draw(NamedTuple):
    """One sample asked of the loader: the prompt's number in its file and the number that keys its random draws."""

    prompt: int
    key: int


class DrawnPrompts(Dataset):
    """View of a prompt data set that is addressed by `Draw`, so that each prompt travels with its key."""

    def __init__(self, prompts: Dataset) -> None:
        self.prompts = prompts

    def __getitem__(self, draw: Draw) -> tuple[str, int]:
        return self.prompts[draw.prompt], draw.key


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
    ) -> None:
        self.batch_size, self.start, self.rank, self.world_size = batch_size, start, rank, world_size
        self.prompt_at = order or ShuffledEpochs(size, seed)

    def __iter__(self) -> Iterator[list[Draw]]:
        batch = self.start
        while True:
            yield self.batch(batch)
            batch += 1

    def batch(self, number: int) -> list[Draw]:
        """Draws of batch `number`, counted from 0; the key of each is its slot in the global batch."""
        first = number * self.batch_size * self.world_size
        slots = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [Draw(self.prompt_at(first + slot), slot) for slot in slots]


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


def collate(samples: list[tuple[str, int]]) -> PromptBatch:
    """Samples of the loader as one `PromptBatch`."""
    prompts, keys = zip(*samples, strict=True)
    return PromptBatch(list(prompts), torch.tensor(keys, dtype=torch.int64))
