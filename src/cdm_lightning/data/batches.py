"""Choose the prompts of each training and validation batch.

The prompts of a training batch are a function of (seed, iteration), so a resumed run needs no saved position.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cdm_lightning.core.rng import permutation

if TYPE_CHECKING:
    from cdm_lightning.data.prompts import Prompts

Order = Callable[[int], int]  # position in the endless stream of all ranks -> number of the prompt


PADDING = -1  # key of a draw that only fills a batch; its result is ignored


class PromptBatch(NamedTuple):
    """A batch of B prompts. Each prompt has a number that seeds its random numbers, such as its noise.

    - `prompts`: B texts.
    - `indices`: (B,) int64 on the CPU, the numbers that seed the random numbers. In training, a number is the sample's
      place in the global batch over all ranks. In validation, it is the prompt's number in its set, or `PADDING` (-1)
      for a prompt that only fills the batch.
    - `images`: (B, 3, H, W) in [0, 1], real images of the prompts, or None if the objective needs none.
    - `group`: all batches whose rollouts are computed together with the rollouts of this batch, this batch included.
      Only the batch that is delivered first has this list; `group` is empty in the others. It is also empty if the
      rollouts of each batch are computed separately.
    """

    prompts: list[str]
    indices: Tensor
    images: Tensor | None = None
    group: tuple["PromptBatch", ...] = ()

    def split(self, count: int) -> list["PromptBatch"]:
        """Split the batch into at most `count` parts whose sizes differ by at most 1.

        If the batch has fewer than `count` samples, each part has one sample. The attribute `group` of the parts is
        empty.
        """
        parts = spans(len(self.prompts), count)
        images = self.images
        return [
            PromptBatch(self.prompts[span], self.indices[span], None if images is None else images[span])
            for span in parts
        ]


def spans(size: int, count: int) -> list[slice]:
    """Cut range(size) into at most `count` slices whose lengths differ by at most 1.

    If `size` is smaller than `count`, there are `size` slices of length 1.
    """
    edges = [size * n // count for n in range(count + 1)]
    return [slice(first, end) for first, end in pairwise(edges) if end > first]


class Draw(NamedTuple):
    """A request to load prompt number `prompt` for batch number `batch`. `key` seeds the prompt's random numbers."""

    prompt: int
    key: int
    batch: int = 0


class Drawn(NamedTuple):
    """The prompt that a `Draw` asked for: its text, its image, and the `key` and `batch` of the `Draw`."""

    prompt: str
    key: int
    batch: int
    image: Tensor | None = None  # (3, H, W)


class DrawnPrompts(Dataset):
    """A data set that takes a `Draw` (a request for one of `prompts`) as its index and returns the prompt as a `Drawn`.

    With `images`, the `Drawn` also has the prompt's real image.
    """

    def __init__(self, prompts: "Prompts", images: bool = False) -> None:
        self.prompts, self.images = prompts, images

    def __getitem__(self, index: Draw) -> Drawn:
        image = self.prompts.image(index.prompt) if self.images else None
        return Drawn(self.prompts[index.prompt], index.key, index.batch, image)


class ShuffledEpochs:
    """An endless shuffled order of the prompts 0..size-1.

    Each epoch has its own permutation, a function of `seed`, `key` and the number of the epoch.
    """

    def __init__(self, size: int, seed: int, *key: int) -> None:
        self.size, self.seed, self.key = size, seed, key
        self._epoch, self._numbers = 0, permutation(size, seed, "prompt_order", 0, *key)

    def __call__(self, position: int) -> int:
        """Return the number of the prompt at `position`, counted from 0."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._numbers = epoch, permutation(self.size, self.seed, "prompt_order", epoch, *self.key)
        return int(self._numbers[place])


class EndlessBatches(Sampler):
    """The endless sequence of training batches of one rank, from batch `start` on, as lists of `Draw`s.

    `order` maps a position in the endless stream of prompts to the number of a prompt. By default, the `size` prompts
    are shuffled in each epoch. A batch may contain the end of one epoch and the start of the next. Each batch consists
    of the next `world_size * batch_size` prompts of the stream, of which each rank takes `batch_size`. The batch of all
    ranks together is therefore the same for any `world_size` and `batch_size` with the same product.

    Batch n is for iteration n. `groups(n)` gives the iterations whose rollouts are computed together with the rollout
    of iteration n, n included (default: n alone). The list for the first of these iterations contains the draws of its
    own batch, followed by the draws of all other batches of the group. If `start` is in the middle of a group, the list
    for iteration `start` also contains the draws of the whole group, those of batch `start` first. The lists for all
    other iterations of the group contain only the draws of their own batch.
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
        groups: Callable[[int], range] | None = None,
    ) -> None:
        self.batch_size, self.start, self.rank, self.world_size = batch_size, start, rank, world_size
        self.prompt_at, self.groups = order or ShuffledEpochs(size, seed), groups

    def __iter__(self) -> Iterator[list[Draw]]:
        number = self.start
        while True:
            group = self.groups(number) if self.groups else range(number, number + 1)
            others = [other for other in group if other != number] if number in (self.start, group.start) else []
            yield [draw for one in (number, *others) for draw in self.batch(one)]
            number += 1

    def batch(self, number: int) -> list[Draw]:
        """Return this rank's `Draw`s of batch `number`, counted from 0.

        The `key` of a `Draw` is its place in the global batch over all ranks.
        """
        first = number * self.batch_size * self.world_size
        slots = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [Draw(self.prompt_at(first + slot), slot, number) for slot in slots]


def evaluation_batches(size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[Draw]]:
    """Return this rank's share of the prompts 0..size-1, in order, as batches of at most `batch_size` `Draw`s.

    The `key` of a `Draw` is the number of its prompt. All ranks get the same number of batches, because ranks with
    shards of one network must make the same number of network calls. A rank that has no prompts for a batch gets a
    batch of one `Draw` with the key `PADDING` (-1). What is computed for such a `Draw` must be ignored.
    """
    first, end = size * rank // world_size, size * (rank + 1) // world_size
    longest = -(-size // world_size)
    batches = []
    for begin in range(0, longest, batch_size):
        numbers = range(first + begin, min(first + begin + batch_size, end))
        batches.append([Draw(number, number) for number in numbers] or [Draw(0, PADDING)])
    return batches


def collate(samples: list[Drawn]) -> PromptBatch:
    """Return a `PromptBatch` of those samples that have the same `batch` as the first sample.

    If the samples come from several batches, `group` of the result contains the `PromptBatch`es of all of them, the
    first sample's batch included.
    """
    by_batch = {number: [] for number in dict.fromkeys(sample.batch for sample in samples)}
    for sample in samples:
        by_batch[sample.batch].append(sample)
    batches = {number: _batch(drawn) for number, drawn in by_batch.items()}
    own = batches[samples[0].batch]
    if len(batches) == 1:
        return own
    return own._replace(group=tuple(batches[number] for number in sorted(batches)))


def _batch(drawn: list[Drawn]) -> PromptBatch:
    keys = torch.tensor([sample.key for sample in drawn], dtype=torch.int64)
    images = None if drawn[0].image is None else torch.stack([cast(Tensor, sample.image) for sample in drawn])
    return PromptBatch([sample.prompt for sample in drawn], keys, images)
