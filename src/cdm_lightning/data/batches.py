"""Which prompts batch n of training holds: a function of (seed, n), so a resumed run needs no saved position in the data."""

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


PADDING = -1  # key of a draw that only fills up a batch and whose result is not used


class PromptBatch(NamedTuple):
    """A batch of B prompts, each with the number (key) from which its random draws, such as its noise, are derived.

    `indices` (B,) int64 on the CPU are these keys: in training each sample's place in the global batch over all ranks, in
    validation the prompt's number in its file, or `PADDING`. `images` (B, 3, H, W) in [0, 1] are the real images of the
    prompts, if the objective needs them. If the rollouts of several iterations are computed as one batch, `group` holds the
    batches of all of them in order, this one included; only the first of them that the loader delivers has it.
    """

    prompts: list[str]
    indices: Tensor
    images: Tensor | None = None
    group: tuple["PromptBatch", ...] = ()

    def split(self, count: int) -> list["PromptBatch"]:
        """Split into `count` parts, without `group`, whose sizes differ by at most 1; into single samples if there are fewer."""
        parts = spans(len(self.prompts), count)
        images = self.images
        return [
            PromptBatch(self.prompts[span], self.indices[span], None if images is None else images[span])
            for span in parts
        ]


def spans(size: int, count: int) -> list[slice]:
    """Cut range(size) into `count` slices whose lengths differ by at most 1; into `size` slices of length 1 if size < count."""
    edges = [size * n // count for n in range(count + 1)]
    return [slice(first, end) for first, end in pairwise(edges) if end > first]


class Draw(NamedTuple):
    """A request to the loader: the number of a prompt in its set, the key of its random draws, and the number of its batch."""

    prompt: int
    key: int
    batch: int = 0


class Drawn(NamedTuple):
    """What the loader has read for a `Draw`: the prompt's text, the key of its random draws, its batch's number, its image."""

    prompt: str
    key: int
    batch: int
    image: Tensor | None = None  # (3, H, W)


class DrawnPrompts(Dataset):
    """A data set for the `DataLoader`: it is indexed by `Draw` and returns `Drawn`, so that each prompt keeps its key.

    With `images`, each sample also has its real image (`Prompts.image`).
    """

    def __init__(self, prompts: "Prompts", images: bool = False) -> None:
        self.prompts, self.images = prompts, images

    def __getitem__(self, index: Draw) -> Drawn:
        image = self.prompts.image(index.prompt) if self.images else None
        return Drawn(self.prompts[index.prompt], index.key, index.batch, image)


class ShuffledEpochs:
    """An endless order of the prompts 0..size-1: each epoch has its own permutation, a function of `seed`, `key` and epoch."""

    def __init__(self, size: int, seed: int, *key: int) -> None:
        self.size, self.seed, self.key = size, seed, key
        self._epoch, self._numbers = 0, permutation(size, seed, "prompt_order", 0, *key)

    def __call__(self, position: int) -> int:
        """Return the number of the prompt at `position`; positions count from 0."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._numbers = epoch, permutation(self.size, self.seed, "prompt_order", epoch, *self.key)
        return int(self._numbers[place])


class EndlessBatches(Sampler):
    """The endless sequence of batches `start`, `start + 1`, ... of one rank, each a list of `batch_size` draws.

    The `size` prompts come in `order` (default: shuffled epochs); a batch may span two epochs. Together the ranks take
    `world_size * batch_size` consecutive prompts for each batch, so the global batch does not depend on how it is split
    over ranks.

    `groups(n)` is the range of iterations whose rollouts are computed in one batch with those of iteration n (default: n
    alone). The first batch that is read of such a group is longer: after its own draws it holds those of the group's other
    batches, which are yielded again in their turn.
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
        """Return this rank's draws of batch `number`, from 0; the key of a draw is its place in the global batch of all ranks."""
        first = number * self.batch_size * self.world_size
        slots = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [Draw(self.prompt_at(first + slot), slot, number) for slot in slots]


def evaluation_batches(size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[Draw]]:
    """Return this rank's share of the prompts 0..size-1, in their order, in batches of at most `batch_size`.

    The key of each draw is the number of its prompt. All ranks get the same number of batches: with sharded networks all
    must make the same calls. Where a rank has no prompts left, its batch is one draw with the key `PADDING`, whose result
    must not be used.
    """
    first, end = size * rank // world_size, size * (rank + 1) // world_size
    longest = -(-size // world_size)
    batches = []
    for begin in range(0, longest, batch_size):
        numbers = range(first + begin, min(first + begin + batch_size, end))
        batches.append([Draw(number, number) for number in numbers] or [Draw(0, PADDING)])
    return batches


def collate(samples: list[Drawn]) -> PromptBatch:
    """Return the `PromptBatch` that the first sample belongs to; if the samples are of several batches, `group` holds all."""
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
