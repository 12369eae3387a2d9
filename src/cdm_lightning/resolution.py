"""Which size of image an iteration trains at: the backbone's own, or one of several, drawn anew each time.

No images are needed for that: a rollout starts from noise, so its size is the size of the noise. The shift of the sigmas
follows it where the family's scheduler does so (`Backbone.at`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, cast

import torch

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.errors import UserError


class Resolution(Protocol):
    """A choice of image sizes."""

    def check(self, backbone: Backbone) -> None:
        """UserError if the family cannot make images of one of the sizes; reads configuration files, no weights."""

    def draw(self, backbone: Backbone, rng: StepRandom) -> Backbone:
        """The backbone at the size of this iteration, alike in all processes: a function of (seed, iteration)."""


@dataclass(frozen=True)
class OwnSize:
    """Always the size that the backbone was configured for."""

    def check(self, backbone: Backbone) -> None:
        """UserError if the family cannot make images of that size."""
        _ = backbone.image_size

    def draw(self, backbone: Backbone, rng: StepRandom) -> Backbone:
        """The backbone itself."""
        return backbone


@dataclass(frozen=True)
class Buckets:
    """One of `sizes`, pairs (height, width) in pixels, with probabilities proportional to `weights` (default: equal ones).

    All samples of an iteration have one size, whatever the number of processes. Raises UserError for sizes that are no
    such pairs and for weights that do not go with them.
    """

    sizes: Sequence[Sequence[int]]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        pairs = self.sizes if isinstance(self.sizes, Sequence) and not isinstance(self.sizes, str) else ()
        if not pairs or not all(_is_pair(pair) for pair in pairs):
            raise UserError(
                f"resolution.sizes={self.sizes}: give pairs of height and width in pixels, [[1024,1024],[768,1344]]"
            )
        weights = [1.0] * len(pairs) if self.weights is None else self.weights
        if not isinstance(weights, Sequence) or not all(_is_weight(weight) for weight in weights):
            raise UserError(f"resolution.weights={self.weights}: give a list of numbers of at least 0, or null")
        if len(weights) != len(pairs) or sum(weights) <= 0:
            raise UserError(f"resolution: {len(pairs)} sizes need as many weights, not all 0, got {list(weights)}")

    def check(self, backbone: Backbone) -> None:
        """UserError if the family cannot make images of one of the sizes."""
        for height, width in self.sizes:
            try:
                backbone.at(height, width)
            except UserError as error:
                raise UserError(f"resolution.sizes, {height} x {width}: {error}") from error

    def draw(self, backbone: Backbone, rng: StepRandom) -> Backbone:
        """The backbone at the size of this iteration, alike in all processes: a function of (seed, iteration)."""
        weights = torch.tensor(self.weights or [1.0] * len(self.sizes), dtype=torch.float64, device="cpu")
        chosen = int(torch.multinomial(weights, 1, generator=rng.shared("resolution")))
        return backbone.at(*self.sizes[chosen])


def _is_pair(pair: object) -> bool:
    is_list = isinstance(pair, Sequence) and not isinstance(pair, str)
    return is_list and len(pair) == 2 and all(isinstance(side, int) and not isinstance(side, bool) for side in pair)


def _is_weight(weight: object) -> bool:
    return isinstance(weight, Real) and not isinstance(weight, bool) and 0 <= cast(float, weight) < float("inf")
