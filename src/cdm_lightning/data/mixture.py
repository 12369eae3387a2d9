"""A mixture of several sets of prompts in fixed shares. The n-th training prompt is a function of (seed, n) alone."""

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
    """Several sets of prompts, called sources, as one set. Each source has a fixed share of the training prompts.

    `sources` maps the name of each source to its prompts, and `weights` maps the same names to weights, which are
    proportional to the shares. The weights are turned into whole numbers, for example 0.7 and 0.3 into 7 and 3. Each
    block of 10 training prompts (7 + 3) then has 7 prompts of the first source and 3 of the second, in random order.
    Each source is shuffled in epochs of its own. Without `weights`, the whole numbers are the sources' numbers of
    prompts. The prompts of the mixture are numbered from 0, one source after the other.

    The mixture has images if all sources have images. Raises `UserError` if there is no source, if a weight is missing
    or not positive, or if the whole numbers of `weights` add up to more than 10,000. The method `image` raises
    `UserError` for an image whose size differs from that of the first source's images.
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
        """One line with an entry for each source.

        An entry is the source's share of the training prompts in percent, followed by the source's `summary`, or by the
        source's name if the `summary` is None.
        """
        total = sum(self.shares)
        lines = [
            f"{share / total:.2%} {source.summary or name}"
            for (name, source), share in zip(self.sources.items(), self.shares, strict=True)
        ]
        return "; ".join(lines)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        """Return prompt number `index`, counted from 0 through all sources. Raises IndexError if it does not exist."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        source, place = self._at(index)
        return self.sources[source][place]

    def image(self, index: int) -> Tensor:
        """Return the image of prompt `index`, (3, H, W) in [0, 1].

        Raises `UserError` if the image's size differs from that of the images of the first source.
        """
        source, place = self._at(index)
        image = self.sources[source].image(place)
        if self._image_size is None:
            self._image_size = next(iter(self.sources.values())).image(0).shape[-2:]
        if image.shape[-2:] != self._image_size:
            sizes = [" x ".join(map(str, size)) for size in (self._image_size, image.shape[-2:])]
            first = next(iter(self.sources))
            raise UserError(
                f"data.train.sources: images of {first} have size {sizes[0]}, but images of {source} have {sizes[1]}; "
                "give both sources the same image_size"
            )
        return image

    def _at(self, index: int) -> tuple[str, int]:
        """Return the name of the source that contains prompt `index`, and the number of the prompt in this source."""
        number = bisect_right(self._ends, index)
        return list(self.sources)[number], index - self._ends[number] + self.sizes[number]

    def order(self, seed: int) -> Order:
        """Return the endless training order: a function that maps a position, from 0 on, to the number of a prompt."""
        return MixedOrder(self.sizes, self.shares, seed)


class MixedOrder:
    """The endless training order of a mixture. The prompt at any position is computed without those before it.

    `sizes` are the numbers of prompts in the sources, and `shares` are the sources' weights as whole numbers. Shares of
    7 and 3, for example, give blocks of 10 positions. In each block, a random permutation assigns 7 positions to the
    first source and 3 to the second. A position gets the next prompt of its source, in shuffled epochs of this source.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[int], seed: int) -> None:
        self.shares, self.seed = list(shares), seed
        self._starts, self._ends = [0, *accumulate(sizes)], list(accumulate(shares))
        self._orders = [ShuffledEpochs(size, seed, number) for number, size in enumerate(sizes)]
        self._block, self._slots = 0, permutation(self._ends[-1], seed, "prompt_mixture", 0)

    def __call__(self, position: int) -> int:
        """Return the number of the prompt at `position`, counted from 0. Prompts are numbered through all sources."""
        source, turn = self.source_at(position)
        return self._starts[source] + self._orders[source](turn)

    def source_at(self, position: int) -> tuple[int, int]:
        """Return (source, place) for the prompt at `position` in the training order.

        `source` is the number of the source that contains the prompt, and `place` is the prompt's position in the
        shuffled epochs of this source. Both count from 0.
        """
        block, place = divmod(position, self._ends[-1])
        if block != self._block:
            self._block, self._slots = block, permutation(self._ends[-1], self.seed, "prompt_mixture", block)
        slot = int(self._slots[place])
        source = bisect_right(self._ends, slot)
        first = self._ends[source] - self.shares[source]
        return source, block * self.shares[source] + slot - first


def whole_shares(names: Sequence[str], weights: Mapping[str, float]) -> list[int]:
    """Return the weights as the smallest whole numbers in the same ratio, in the order of `names`.

    Raises `UserError` if the keys of `weights` are not exactly `names`, if a weight is not a positive number, or if the
    sum of the whole numbers is above 10,000.
    """
    if set(names) != set(weights):
        raise UserError(
            f"data.train.weights names {', '.join(weights) or 'no source'}, but the sources are {', '.join(names)}; "
            "set one weight for each source"
        )
    try:
        ratios = [Fraction(str(weights[name])) for name in names]  # from the text, so that 0.1 is exactly one tenth
    except ValueError as error:
        raise UserError(f"data.train.weights={dict(weights)} must be numbers above 0, such as 7 or 0.5") from error
    if min(ratios) <= 0:
        raise UserError(f"data.train.weights={dict(weights)} must be positive; remove sources that you do not want")
    common = math.lcm(*(ratio.denominator for ratio in ratios))
    shares = [int(ratio * common) for ratio in ratios]
    shares = [share // math.gcd(*shares) for share in shares]
    if sum(shares) > LARGEST_BLOCK:
        raise UserError(
            f"data.train.weights={dict(weights)} is the ratio {' to '.join(map(str, shares))}, which needs "
            f"blocks of {sum(shares):,} prompts, but a block has at most {LARGEST_BLOCK:,}; "
            "round the weights to a simpler ratio, such as 7 to 3"
        )
    return shares
