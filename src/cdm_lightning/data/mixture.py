"""Several sets of prompts in given shares: which set a position of the stream comes from depends on (seed, position) only."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate

from torch import Size, Tensor

from cdm_lightning.core.rng import permutation
from cdm_lightning.data.batches import Order, ShuffledEpochs
from cdm_lightning.data.prompts import Prompts
from cdm_lightning.errors import UserError

LARGEST_BLOCK = 10_000  # positions after which the shares hold exactly


class MixedPrompts(Prompts):
    """All `sources`, by name, one after the other; in training each appears in the share of its weight.

    The stream is cut into blocks of as many positions as the weights, brought to whole numbers without a common factor,
    add up to: 0.7 and 0.3 to 10. Each block holds exactly the weights' numbers of each source, in a random order, so the
    share is exact over any number of blocks. Each source is dealt out in its own shuffled epochs. Without `weights` each
    counts as much as it has prompts.

    It has images where all its sources do. Raises `UserError` for weights that are missing, not positive, or add up to more
    than 10,000 as whole numbers, and for images of different sizes.
    """

    def __init__(self, sources: Mapping[str, Prompts], weights: Mapping[str, float] | None = None) -> None:
        if not sources:
            raise UserError("data: a mixture needs at least one source")
        self.sources = dict(sources)
        self.sizes = [len(source) for source in self.sources.values()]
        self.shares = self.sizes if weights is None else whole_shares(list(self.sources), weights)
        self._ends = list(accumulate(self.sizes))
        self.has_images = all(source.has_images for source in self.sources.values())
        self._image_size: Size | None = None  # of the first source's images

    @property
    def summary(self) -> str:
        """Every source's line with its share."""
        total = sum(self.shares)
        lines = [
            f"{share / total:.2%} {source.summary or name}"
            for (name, source), share in zip(self.sources.items(), self.shares, strict=True)
        ]
        return "; ".join(lines)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        """Prompt number `index`, counted through the sources one after the other."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        source, place = self._at(index)
        return self.sources[source][place]

    def image(self, index: int) -> Tensor:
        """The image (3, H, W) of prompt number `index`; UserError if the first source's images have another size."""
        source, place = self._at(index)
        image = self.sources[source].image(place)
        if self._image_size is None:
            self._image_size = next(iter(self.sources.values())).image(0).shape[-2:]
        if image.shape[-2:] != self._image_size:
            sizes = [" x ".join(map(str, size)) for size in (self._image_size, image.shape[-2:])]
            first = next(iter(self.sources))
            raise UserError(
                f"data: the images of {first} have {sizes[0]} pixels, those of {source} {sizes[1]}; give all one image_size"
            )
        return image

    def _at(self, index: int) -> tuple[str, int]:
        """The name of the source of prompt number `index`, and its number there."""
        number = bisect_right(self._ends, index)
        return list(self.sources)[number], index - self._ends[number] + self.sizes[number]

    def order(self, seed: int) -> Order:
        """Position -> number of the prompt."""
        return MixedOrder(self.sizes, self.shares, seed)


class MixedOrder:
    """The order of a mixture of sources with these sizes and shares; takes no time to go anywhere.

    Place p of block b is slot s of the block's permutation; the slots belong to the sources in turn, as many as their
    share. Slot k of a source is position b * share + k of the source's own epochs.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[int], seed: int) -> None:
        self.shares, self.seed = list(shares), seed
        self._starts, self._ends = [0, *accumulate(sizes)], list(accumulate(shares))
        self._orders = [ShuffledEpochs(size, seed, number) for number, size in enumerate(sizes)]
        self._block, self._slots = 0, permutation(self._ends[-1], seed, "prompt_mixture", 0)

    def __call__(self, position: int) -> int:
        """The prompt at `position`, counted from 0."""
        source, turn = self.source_at(position)
        return self._starts[source] + self._orders[source](turn)

    def source_at(self, position: int) -> tuple[int, int]:
        """The source that `position` belongs to, and the position in that source's own stream."""
        block, place = divmod(position, self._ends[-1])
        if block != self._block:
            self._block, self._slots = block, permutation(self._ends[-1], self.seed, "prompt_mixture", block)
        slot = int(self._slots[place])
        source = bisect_right(self._ends, slot)
        first = self._ends[source] - self.shares[source]
        return source, block * self.shares[source] + slot - first


def whole_shares(names: Sequence[str], weights: Mapping[str, float]) -> list[int]:
    """The weights of these names as whole numbers in the same ratio, without a common factor."""
    if set(names) != set(weights):
        raise UserError(f"data: weights are given for {', '.join(weights)}, but the sources are {', '.join(names)}")
    try:
        ratios = [Fraction(str(weights[name])) for name in names]  # by the text: 0.1 is a tenth
    except ValueError as error:
        raise UserError(f"data: weights must be numbers, got {dict(weights)}") from error
    if min(ratios) <= 0:
        raise UserError(
            f"data: weights must be positive, got {dict(weights)}; leave out a source that shall not appear"
        )
    common = math.lcm(*(ratio.denominator for ratio in ratios))
    shares = [int(ratio * common) for ratio in ratios]
    shares = [share // math.gcd(*shares) for share in shares]
    if sum(shares) > LARGEST_BLOCK:
        raise UserError(f"data: weights must be in a simple ratio such as 7 to 3, got {dict(weights)}")
    return shares
