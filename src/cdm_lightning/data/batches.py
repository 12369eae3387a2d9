"""The prompts of each training batch. They are a function of (seed, iteration), so a resumed run needs no saved position."""

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
    """A batch of B prompts, each with a number that seeds its random numbers, such as its noise.

    - `prompts`: B texts.
    - `indices`: (B,) int64 on the CPU, these numbers. In training, a sample's number is its place in the global
      batch over all ranks. In validation, it is the prompt's number in its file, or `PADDING`.
    - `images`: (B, 3, H, W) in [0, 1], real images of the prompts, or None if the objective needs none.
    - `group`: if several iterations compute their rollouts together, the first batch that is delivered lists all their batches
      here, itself included. In every other batch `group` is empty.
    """

    prompts: list[str]
    indices: Tensor
    images: Tensor | None = None
    group: tuple["PromptBatch", ...] = ()

    def split(self, count: int) -> list["PromptBatch"]:
        """Split the batch into at most `count` parts whose sizes differ by at most 1. The attribute `group` of the parts is empty.

        If the batch has fewer than `count` samples, each part has one sample.
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
    """A request for one prompt: its number, the number that seeds its random numbers (`key`), and the number of its batch."""

    prompt: int
    key: int
    batch: int = 0


class Drawn(NamedTuple):
    """A prompt that was loaded for a `Draw`: its text, the `key` and `batch` of the request, and its image."""

    prompt: str
    key: int
    batch: int
    image: Tensor | None = None  # (3, H, W)


class DrawnPrompts(Dataset):
    """A data set of prompts. Its index is a `Draw`, a request for one prompt, and it returns a `Drawn`, the prompt itself.

    With `images`, it also loads each prompt's real image.
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
    """The endless sequence of training batches of one rank, from batch `start` on. Each batch is a list of `batch_size` draws.

    `order` gives the order of the `size` prompts. By default, each epoch is shuffled, and a batch may contain the end of one
    epoch and the start of the next. All ranks together take `world_size * batch_size` consecutive prompts for each batch.
    Therefore the global batch does not depend on the number of ranks.

    `groups(n)` gives the iterations whose rollouts are computed together with the rollout of iteration n, n included (default: n
    alone). In the first of them, or in `start` if a run resumes between them, the list contains the draws of its own batch,
    followed by those of all other batches of the group. Later batches are yielded once more, in their own iterations.
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
        """Return this rank's draws of batch `number`, counted from 0.

        The key of each draw is its place in the global batch over all ranks.
        """
        first = number * self.batch_size * self.world_size
        slots = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [Draw(self.prompt_at(first + slot), slot, number) for slot in slots]


def evaluation_batches(size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[Draw]]:
    """Return this rank's share of the prompts 0..size-1, in order, in batches of at most `batch_size`.

    The key of each draw is the number of its prompt. All ranks get the same number of batches, because ranks with sharded
    networks must make the same calls. A rank without prompts gets a batch of one draw with the key `PADDING`. The result of
    such a draw must be ignored.
    """
    first, end = size * rank // world_size, size * (rank + 1) // world_size
    longest = -(-size // world_size)
    batches = []
    for begin in range(0, longest, batch_size):
        numbers = range(first + begin, min(first + begin + batch_size, end))
        batches.append([Draw(number, number) for number in numbers] or [Draw(0, PADDING)])
    return batches


def collate(samples: list[Drawn]) -> PromptBatch:
    """Return the `PromptBatch` of the samples that belong to the same batch as the first sample.

    If there are samples of other batches, the attribute `group` of the result contains all batches, the returned one included.
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
