"""Which prompts make up batch n: a function of (seed, n), so that a run can go on anywhere without a saved position."""

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


PADDING = -1  # key of a draw that is there only to be computed


class PromptBatch(NamedTuple):
    """Prompts with the number that keys their random draws.

    `indices` (B,) int64 on the CPU: in training the slot of each sample within the global batch (over all ranks), in
    validation the number of the prompt in its file. `images` (B, 3, H, W) in [0, 1] are the prompts' real images, where the
    objective needs them. `group` are the batches of all iterations that roll out as one batch, in their order and with this
    one among them: set on the first batch of a group that is read, empty on the others.
    """

    prompts: list[str]
    indices: Tensor
    images: Tensor | None = None
    group: tuple["PromptBatch", ...] = ()

    def split(self, count: int) -> list["PromptBatch"]:
        """The batch in `count` parts of sizes that differ by 1 at most, or in single samples if there are fewer."""
        parts = spans(len(self.prompts), count)
        images = self.images
        return [
            PromptBatch(self.prompts[span], self.indices[span], None if images is None else images[span])
            for span in parts
        ]


def spans(size: int, count: int) -> list[slice]:
    """0..size-1 in `count` runs whose lengths differ by 1 at most, or in single numbers if there are fewer."""
    edges = [size * n // count for n in range(count + 1)]
    return [slice(first, end) for first, end in pairwise(edges) if end > first]


class Draw(NamedTuple):
    """A request to the loader: the prompt's number in its file, the number that keys its random draws, its batch's number."""

    prompt: int
    key: int
    batch: int = 0


class Drawn(NamedTuple):
    """A sample that the loader read: prompt, the number that keys its random draws, its batch's number, its image."""

    prompt: str
    key: int
    batch: int
    image: Tensor | None = None  # (3, H, W)


class DrawnPrompts(Dataset):
    """View of a prompt data set that is addressed by `Draw`, so that each prompt travels with its key.

    With `images`, each brings its image (`Prompts.image`).
    """

    def __init__(self, prompts: "Prompts", images: bool = False) -> None:
        self.prompts, self.images = prompts, images

    def __getitem__(self, index: Draw) -> Drawn:
        image = self.prompts.image(index.prompt) if self.images else None
        return Drawn(self.prompts[index.prompt], index.key, index.batch, image)


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

    `groups(n)` are the batches that roll out with batch n: the first of them that is read brings the draws of the others,
    after its own.

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


def collate(samples: list[Drawn]) -> PromptBatch:
    """Samples of the loader as the `PromptBatch` that the first of them belongs to, with the others of its group."""
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
