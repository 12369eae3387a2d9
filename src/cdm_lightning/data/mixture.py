"""Several sets of prompts in fixed shares. Which set gives the n-th prompt of training is a function of (seed, n) alone."""

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
from cdm_lightning.kinds import Name, Positive

LARGEST_BLOCK = 10_000  # the largest number of positions after which the shares are exact


class MixedPrompts(Prompts):
    """Several sets of prompts as one. Training draws from each of the named `sources` in the share of its weight.

    The weights become whole numbers without a common factor, for example 0.7 and 0.3 become 7 and 3. The endless sequence
    of training prompts consists of blocks as long as the sum of these numbers (here 10). In each block every source has
    exactly its number of prompts, in a random order. Each source is shuffled in epochs of its own. Without `weights`, the
    weight of a source is its number of prompts. By index, the prompts of all sources follow one after the other.

    It has images if all sources have. Raises `UserError` if there is no source, for weights that are missing, not positive,
    or add up to more than 10,000 as whole numbers, and (when they are read) for images of different sizes.
    """

    def __init__(self, sources: Mapping[Name, Prompts], weights: Mapping[Name, Positive] | None = None) -> None:
        if not sources:
            raise UserError("data: a mixture needs at least one source; set data.train.sources")
        self.sources = dict(sources)
        self.sizes = [len(source) for source in self.sources.values()]
        self.shares = self.sizes if weights is None else whole_shares(list(self.sources), weights)
        self._ends = list(accumulate(self.sizes))
        self.has_images = all(source.has_images for source in self.sources.values())
        self._image_size: Size | None = None  # of the first source's images

    @property
    def summary(self) -> str:
        """One line with each source's share in percent and its `summary`, or its name if it has none."""
        total = sum(self.shares)
        lines = [
            f"{share / total:.2%} {source.summary or name}"
            for (name, source), share in zip(self.sources.items(), self.shares, strict=True)
        ]
        return "; ".join(lines)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        """Return prompt number `index`, counted from 0 through all sources one after the other; IndexError if there is none."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        source, place = self._at(index)
        return self.sources[source][place]

    def image(self, index: int) -> Tensor:
        """Return the image (3, H, W) in [0, 1] of prompt `index`; `UserError` if images of the first source have another size."""
        source, place = self._at(index)
        image = self.sources[source].image(place)
        if self._image_size is None:
            self._image_size = next(iter(self.sources.values())).image(0).shape[-2:]
        if image.shape[-2:] != self._image_size:
            sizes = [" x ".join(map(str, size)) for size in (self._image_size, image.shape[-2:])]
            first = next(iter(self.sources))
            raise UserError(
                f"data: the images of {first} have {sizes[0]} pixels, those of {source} {sizes[1]}; use the same image_size for all"
            )
        return image

    def _at(self, index: int) -> tuple[str, int]:
        """Return the name of the source that holds prompt number `index`, and the prompt's number in that source."""
        number = bisect_right(self._ends, index)
        return list(self.sources)[number], index - self._ends[number] + self.sizes[number]

    def order(self, seed: int) -> Order:
        """Return the order of training: a function from a position in it, from 0 without end, to the number of a prompt."""
        return MixedOrder(self.sizes, self.shares, seed)


class MixedOrder:
    """The order in which training takes the prompts of a mixture; the prompt at any position is computed directly.

    `sizes` are the numbers of prompts of the sources, `shares` their whole-number weights. The sequence consists of blocks of
    sum(shares) slots: the first shares[0] slots belong to the first source, and so on; a random permutation of each block
    gives the slot of each position. Slot k of a source in block b is position b * share + k in that source's shuffled epochs.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[int], seed: int) -> None:
        self.shares, self.seed = list(shares), seed
        self._starts, self._ends = [0, *accumulate(sizes)], list(accumulate(shares))
        self._orders = [ShuffledEpochs(size, seed, number) for number, size in enumerate(sizes)]
        self._block, self._slots = 0, permutation(self._ends[-1], seed, "prompt_mixture", 0)

    def __call__(self, position: int) -> int:
        """Return the number, through all sources, of the prompt at `position`; positions count from 0."""
        source, turn = self.source_at(position)
        return self._starts[source] + self._orders[source](turn)

    def source_at(self, position: int) -> tuple[int, int]:
        """Return the number of the source that `position` takes a prompt from, and the position in that source's own order."""
        block, place = divmod(position, self._ends[-1])
        if block != self._block:
            self._block, self._slots = block, permutation(self._ends[-1], self.seed, "prompt_mixture", block)
        slot = int(self._slots[place])
        source = bisect_right(self._ends, slot)
        first = self._ends[source] - self.shares[source]
        return source, block * self.shares[source] + slot - first


def whole_shares(names: Sequence[str], weights: Mapping[str, float]) -> list[int]:
    """Return the weights, in the order of `names`, as whole numbers in the same ratio without a common factor.

    `UserError` for names other than those of the weights, weights that are not positive numbers, and a sum above 10,000.
    """
    if set(names) != set(weights):
        raise UserError(
            f"data: weights are given for {', '.join(weights)}, but the sources are {', '.join(names)}; give one for each"
        )
    try:
        ratios = [Fraction(str(weights[name])) for name in names]  # from the text, so that 0.1 is exactly one tenth
    except ValueError as error:
        raise UserError(f"data: weights must be numbers, got {dict(weights)}") from error
    if min(ratios) <= 0:
        raise UserError(f"data: weights must be positive, got {dict(weights)}; remove a source that is not wanted")
    common = math.lcm(*(ratio.denominator for ratio in ratios))
    shares = [int(ratio * common) for ratio in ratios]
    shares = [share // math.gcd(*shares) for share in shares]
    if sum(shares) > LARGEST_BLOCK:
        raise UserError(f"data: weights must be in a simple ratio such as 7 to 3, got {dict(weights)}; round them")
    return shares
