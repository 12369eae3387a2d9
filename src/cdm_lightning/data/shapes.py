"""A synthetic text-to-image dataset: captions of coloured shapes, and images that are rendered from the captions.

Examples of captions are "a large red circle on the left", "a small square", and "a blue shape above a large green
ring". Like a real prompt, a caption may leave out any attribute. The images of one caption then differ in this
attribute, which bends the paths from noise to image and makes sampling in few steps hard. Captions and images are
computed from seeds, so nothing is stored or downloaded.
"""

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

IMAGE_SIZE = 32
COLOURS = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.10, 0.66, 0.18),
    "blue": (0.12, 0.24, 0.90),
    "yellow": (0.96, 0.84, 0.08),
    "purple": (0.56, 0.12, 0.70),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
ANY_SHAPE = "shape"  # the noun of a caption that does not name the shape
SIZES = ("small", "large")
PLACES = {  # centre (x, y) as fractions of the side, from the upper left corner
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the middle": (0.5, 0.5),
}
RELATIONS = ("above", "below", "left of", "right of")
RADIUS = {"small": 0.135, "large": 0.225}  # as a fraction of the side; the same for single items and in pairs
PAIR_OFFSET = 0.25  # distance of each item of a pair from the centre, as a fraction of the side
LEAVE_OUT = 0.4  # probability with which a caption leaves out each of colour, shape, size and place
HELD_OUT = 10  # one in this many combinations of captioned attributes is never trained on
Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class Item:
    """One shape in a caption. An attribute that the caption leaves out is None."""

    colour: str | None
    shape: str | None
    size: str | None = None

    def words(self) -> str:
        """Return the item as a noun phrase, such as "a large red circle"."""
        return " ".join(["a", *filter(None, (self.size, self.colour)), self.shape or ANY_SHAPE])


@dataclass(frozen=True)
class Scene:
    """The content of a caption: one item at a `place`, or two items in a `relation` such as "above".

    A `place` of None means that the caption names no place.
    """

    first: Item
    place: str | None = None
    relation: str | None = None
    second: Item | None = None

    @property
    def caption(self) -> str:
        """The caption of the scene, in lower case without punctuation."""
        if self.relation:
            return f"{self.first.words()} {self.relation} {cast(Item, self.second).words()}"
        return f"{self.first.words()} {self.place}" if self.place else self.first.words()

    @property
    def held_out(self) -> bool:
        """Whether the scene's combination of attributes is kept out of the training set.

        A hash of the scene's caption decides whether the scene is kept out.
        """
        return int.from_bytes(hashlib.blake2b(self.caption.encode(), digest_size=4).digest(), "little") % HELD_OUT == 0


def all_words() -> list[str]:
    """Return every word that captions can contain, in a fixed order."""
    phrases = [*COLOURS, *SHAPES, *SIZES, *PLACES, *RELATIONS, ANY_SHAPE, "a"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def draw_scenes(
    count: int, seed: int, split: Split = "train", pairs: float = 0.0, leave_out: float = LEAVE_OUT
) -> list[Scene]:
    """Draw `count` random scenes.

    With `split` "heldout", every scene has a combination of attributes that is kept out of the training set. With
    "train", no scene has one. "all" gives scenes of both kinds. A scene has two items with probability `pairs`, and
    otherwise one. Each attribute is left out with probability `leave_out`.
    """
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = _draw_pair(rng, leave_out) if rng.random() < pairs else _draw_single(rng, leave_out)
        if split == "all" or scene.held_out == (split == "heldout"):
            scenes.append(scene)
    return scenes


def _draw_item(rng: random.Random, leave_out: float) -> Item:
    colour, shape, size = (_maybe(rng, names, leave_out) for names in (COLOURS, SHAPES, SIZES))
    return Item(colour, shape, size)


def _draw_single(rng: random.Random, leave_out: float) -> Scene:
    return Scene(_draw_item(rng, leave_out), place=_maybe(rng, PLACES, leave_out))


def _draw_pair(rng: random.Random, leave_out: float) -> Scene:
    first, second = _draw_item(rng, leave_out), _draw_item(rng, leave_out)
    while second.colour is not None and second.colour == first.colour:
        second = replace(second, colour=rng.choice(list(COLOURS)))
    return Scene(first, relation=rng.choice(RELATIONS), second=second)


def _maybe(rng: random.Random, names: Iterable[str], leave_out: float) -> str | None:
    return None if rng.random() < leave_out else rng.choice(list(names))


def parse_caption(caption: str) -> Scene:
    """Return the scene that a caption of the shapes set describes. Raises ValueError for any other text."""
    for relation in RELATIONS:
        if f" {relation} a " in caption:
            first, second = caption.split(f" {relation} ", 1)
            return Scene(_parse_item(first), relation=relation, second=_parse_item(second))
    for place in PLACES:
        if caption.endswith(place):
            return Scene(_parse_item(caption.removesuffix(place).strip()), place=place)
    return Scene(_parse_item(caption))


def _parse_item(phrase: str) -> Item:
    article, *adjectives, noun = phrase.split() if len(phrase.split()) > 1 else ("", "")
    size = adjectives.pop(0) if adjectives and adjectives[0] in SIZES else None
    colour = adjectives.pop(0) if adjectives and adjectives[0] in COLOURS else None
    if article != "a" or adjectives or noun not in (*SHAPES, ANY_SHAPE):
        raise ValueError(f"not a caption of the shapes set: {phrase!r}")
    return Item(colour, None if noun == ANY_SHAPE else noun, size)


@dataclass(frozen=True)
class Layout:
    """The content of N images. Each image has two slots, which hold its shapes.

    Of two shapes, the upper or left one is in the first slot. A single shape is in the first slot, and the second slot
    is empty.

    - `colour`, `shape`, `size`: (N, 2) indices into COLOURS, SHAPES and SIZES; -1 for an empty slot.
    - `place`: (N,) index into PLACES; -1 for an image with two shapes.
    - `arrangement`: (N,) 0 for a single shape, 1 for shapes above each other, 2 for shapes side by side.
    - `centre`: (N, 2, 2) centre (x, y) of each slot as fractions of the image's side, from the upper left corner.
    """

    colour: Tensor
    shape: Tensor
    size: Tensor
    place: Tensor
    arrangement: Tensor
    centre: Tensor


def lay_out(scenes: Sequence[Scene], seed: int) -> Layout:
    """Return a layout with one image for each scene. Attributes that a scene leaves out are drawn at random.

    The layout is a function of `seed` and `scenes`.
    """
    rng = random.Random(seed)
    rows = [_lay_out_one(scene, rng) for scene in scenes]
    columns = list(zip(*rows, strict=True))
    return Layout(*(torch.tensor(column) for column in columns))


def _lay_out_one(scene: Scene, rng: random.Random) -> tuple:
    def attributes(item: Item) -> tuple[int, int, int]:
        colour, shape = item.colour or rng.choice(list(COLOURS)), item.shape or rng.choice(SHAPES)
        return list(COLOURS).index(colour), SHAPES.index(shape), SIZES.index(item.size or rng.choice(SIZES))

    if scene.relation is None:
        place = scene.place or rng.choice(list(PLACES))
        a, centre = attributes(scene.first), PLACES[place]
        return (a[0], -1), (a[1], -1), (a[2], -1), list(PLACES).index(place), 0, (centre, (0.5, 0.5))
    upright = scene.relation in ("above", "below")
    items = [scene.first, cast(Item, scene.second)]
    if scene.relation in ("below", "right of"):
        items.reverse()
    a, b = (attributes(item) for item in items)
    low, high = 0.5 - PAIR_OFFSET, 0.5 + PAIR_OFFSET
    centres = ((0.5, low), (0.5, high)) if upright else ((low, 0.5), (high, 0.5))
    return (a[0], b[0]), (a[1], b[1]), (a[2], b[2]), -1, 1 if upright else 2, centres


def render(scenes: Sequence[Scene], seed: int) -> Tensor:
    """Render one image for each scene: (N, 3, 32, 32) in [0, 1], a function of `seed` and `scenes`.

    The place, size, tilt and tint of each shape vary a little, and the backgrounds are random.
    """
    return render_layout(lay_out(scenes, seed), seed)


def render_layout(layout: Layout, seed: int) -> Tensor:
    """Render the N images of a layout: (N, 3, 32, 32) in [0, 1], a function of `layout` and `seed`.

    `seed` seeds the random backgrounds and the small variations of place, size, tilt and tint of the shapes.
    """
    rng = torch.Generator().manual_seed(seed)
    images = _background(len(layout.place), rng)
    palette = torch.tensor(list(COLOURS.values()))
    radii = torch.tensor([RADIUS[size] for size in SIZES])
    for slot in (0, 1):
        colour, shape, size = layout.colour[:, slot], layout.shape[:, slot], layout.size[:, slot]
        n = len(colour)
        centre = layout.centre[:, slot] + (torch.rand(n, 2, generator=rng) - 0.5) * 0.08
        radius = radii[size.clamp(min=0)] * (1 + (torch.rand(n, generator=rng) - 0.5) * 0.16)
        tilt = (torch.rand(n, generator=rng) - 0.5) * 0.35
        tint = (palette[colour.clamp(min=0)] + 0.05 * torch.randn(n, 3, generator=rng)).clamp(0, 1)
        cover = _coverage(shape, centre, radius, tilt) * (shape >= 0)[:, None, None]
        light = 1 - 0.16 * (_grid()[1] - centre[:, 1, None, None]) / radius[:, None, None]  # the light comes from above
        ink = (tint[:, :, None, None] * light.clamp(0.8, 1.2)[:, None]).clamp(0, 1)
        images = images + cover[:, None] * (ink - images)
    return images.clamp(0, 1)


def _grid() -> tuple[Tensor, Tensor]:
    line = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def _background(count: int, rng: torch.Generator) -> Tensor:
    """Draw backgrounds (N, 3, 32, 32): dim gradients and waves between two greyish tints."""
    x, y = _grid()
    angle, phase, kind = (torch.rand(count, 1, 1, generator=rng) for _ in range(3))
    along = x * torch.cos(2 * math.pi * angle) + y * torch.sin(2 * math.pi * angle)
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * (1.5 * along + phase))
    ramp = (along + 1.0) / 2.4
    weight = torch.where(kind < 0.5, ramp, wave)[:, None]
    base = 0.18 + 0.27 * torch.rand(count, 1, generator=rng)
    tints = [(base + 0.12 * (torch.rand(count, 3, generator=rng) - 0.5))[:, :, None, None] for _ in range(2)]
    tints[1] = (tints[1] + 0.16 * (torch.rand(count, 1, 1, 1, generator=rng) - 0.5)).clamp(0.08, 0.6)
    return tints[0] + weight * (tints[1] - tints[0])


def _coverage(shape: Tensor, centre: Tensor, radius: Tensor, tilt: Tensor) -> Tensor:
    """Return the fraction of each pixel that an item covers, (N, 32, 32).

    It is computed from the signed distance to the item's edge.
    """
    x, y = _grid()
    x, y = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    cos, sin, r = torch.cos(tilt)[:, None, None], torch.sin(tilt)[:, None, None], radius[:, None, None]
    u, v = (cos * x + sin * y) / r, (cos * y - sin * x) / r
    distance = torch.hypot(u, v)
    arm = 0.34
    cross = torch.minimum(torch.maximum(u.abs() - 1, v.abs() - arm), torch.maximum(u.abs() - arm, v.abs() - 1))
    triangle = torch.maximum(0.879 * u.abs() - 0.477 * v - 0.5, v - 0.7)  # points up; the image's y grows downwards
    signed = {
        "circle": distance - 1,
        "square": torch.maximum(u.abs(), v.abs()) - 0.86,
        "triangle": triangle,
        "ring": (distance - 0.74).abs() - 0.26,
        "cross": cross,
    }
    index = shape.clamp(min=0)[None, :, None, None].expand(1, -1, *x.shape[1:])
    chosen = torch.stack([signed[name] for name in SHAPES]).gather(0, index)[0]
    return (0.5 - chosen * r * IMAGE_SIZE).clamp(0, 1)
