"""The image size of an iteration: always the backbone's size, or one of several sizes that is drawn in each iteration.

Training at several sizes needs no images, because a rollout can start from noise of any size. In some model families
the shift of the sigmas depends on the size (see `Backbone.at`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Protocol, cast

import torch
from annotated_types import Len

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import NotEmpty, NotNegative, Pixels


class Resolution(Protocol):
    """The interface of a rule that chooses the image size of each iteration."""

    def check(self, backbone: Backbone) -> None:
        """Raise UserError if the backbone cannot make images of a size that this rule may choose.

        Only configuration files are read, and no weights.
        """

    def draw(self, backbone: Backbone, rng: StepRandom) -> Backbone:
        """Choose the image size of an iteration, and return `backbone` with this image size.

        `rng` holds the random numbers of the iteration. The size depends on the seed and the iteration only, so it is
        the same in all processes.
        """


@dataclass(frozen=True)
class OwnSize:
    """Every iteration has the image size that is set in the backbone."""

    def check(self, backbone: Backbone) -> None:
        """Raise UserError if the model family cannot make images of the size that is set in the backbone."""
        _ = backbone.image_size

    def draw(self, backbone: Backbone, rng: StepRandom) -> Backbone:
        """Return the backbone unchanged."""
        return backbone


@dataclass(frozen=True)
class Buckets:
    """An image size that is drawn from `sizes` in each iteration, the same for all samples and processes.

    `sizes` are pairs (height, width) in pixels. `weights` gives the relative probability of each size; by default all are equal.
    Raises UserError if a size is not a pair of pixel counts, if a weight is negative, if all weights are 0, or if there are not
    as many weights as sizes.
    """

    sizes: Annotated[Sequence[Annotated[Sequence[Pixels], Len(2, 2)]], NotEmpty]
    weights: Sequence[NotNegative] | None = None

    def __post_init__(self) -> None:
        pairs = self.sizes if isinstance(self.sizes, Sequence) and not isinstance(self.sizes, str) else ()
        if not pairs or not all(_is_pair(pair) for pair in pairs):
            raise UserError(
                f"resolution.sizes={self.sizes} must be pairs of height and width in pixels, for example [[1024,1024],[768,1344]]"
            )
        weights = [1.0] * len(pairs) if self.weights is None else self.weights
        if not isinstance(weights, Sequence) or not all(_is_weight(weight) for weight in weights):
            raise UserError(f"resolution.weights={self.weights} must be a list of numbers of at least 0, or null")
        if len(weights) != len(pairs) or sum(weights) <= 0:
            raise UserError(
                f"resolution.weights={list(weights)} must hold one number for each of the {len(pairs)} sizes, at least one above 0"
            )

    def check(self, backbone: Backbone) -> None:
        """Raise UserError if the model family cannot make images of one of `sizes`."""
        for height, width in self.sizes:
            try:
                backbone.at(height, width)
            except UserError as error:
                raise UserError(f"resolution.sizes, {height} x {width}: {error}") from error

    def draw(self, backbone: Backbone, rng: StepRandom) -> Backbone:
        """Draw the image size of an iteration from `sizes`, and return `backbone` with this image size.

        `rng` holds the random numbers of the iteration. The size depends on the seed and the iteration only, so it is
        the same in all processes.
        """
        weights = torch.tensor(self.weights or [1.0] * len(self.sizes), dtype=torch.float64, device="cpu")
        chosen = int(torch.multinomial(weights, 1, generator=rng.shared("resolution")))
        return backbone.at(*self.sizes[chosen])


def _is_pair(pair: object) -> bool:
    is_list = isinstance(pair, Sequence) and not isinstance(pair, str)
    return is_list and len(pair) == 2 and all(isinstance(side, int) and not isinstance(side, bool) for side in pair)


def _is_weight(weight: object) -> bool:
    return isinstance(weight, Real) and not isinstance(weight, bool) and 0 <= cast(float, weight) < float("inf")
