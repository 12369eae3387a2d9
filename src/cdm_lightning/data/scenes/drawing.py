"""Draw pictures of the storybook scenes, whose captions `grammar` explains.

A picture has 64 x 64 pixels and is a function of its caption and a seed. Drawing it takes about 2 ms on one core.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from cdm_lightning.data.scenes.grammar import Scene, Split, Thing, complete, parse_caption
from cdm_lightning.data.scenes.settings import CANVAS, jitter, paint_setting
from cdm_lightning.data.scenes.things import DARK, FLYING, SKETCHES, Colour, Sketch, mix

IMAGE_SIZE = 64
PALETTE: dict[str, Colour] = {
    "red": (220, 44, 40),
    "orange": (246, 138, 28),
    "yellow": (250, 218, 44),
    "green": (44, 160, 64),
    "blue": (44, 96, 222),
    "purple": (134, 62, 184),
    "pink": (250, 142, 188),
    "white": (246, 246, 244),
    "brown": (134, 84, 46),
    "black": (44, 42, 50),
}
SCALE = {"small": 34.0, "large": 66.0}  # pixels of the canvas a unit; a thing is about two units high
CENTRES = {"left": 0.23, "middle": 0.5, "right": 0.77}  # fractions of the side; large things are moved inwards
RIM = 5.0  # pixels of the canvas
IN_PAIRS = 0.84  # the scale of things side by side


@dataclass(frozen=True)
class Spot:
    """The place of `thing` on the canvas. The thing's foot is at the pixel (x, y).

    `scale` is the number of pixels for one unit of length of the thing's `Sketch`.
    """

    thing: Thing
    x: float
    y: float
    scale: float


def draw_scene(caption: str, seed: int, split: Split = "all") -> tuple[Image.Image, Scene]:
    """Return a 64 x 64 picture of `caption`, and the scene with all attributes that the picture shows.

    The attributes that the caption leaves out are chosen at random by `grammar.complete`, which also explains `split`.
    The same arguments always give the same result. Raises ValueError for a text that is not a caption of the scenes.
    """
    rng = random.Random(f"{caption}/{seed}")
    scene = complete(parse_caption(caption), rng, split)
    canvas = paint_setting(str(scene.setting), rng)
    for spot in _spots(scene, rng):
        _paint_thing(canvas, spot, scene.setting == "sea", rng)
    return canvas.reduce(CANVAS // IMAGE_SIZE), scene


def draw_scenes(captions: Sequence[str], seed: int, split: Split = "all") -> tuple[np.ndarray, list[Scene]]:
    """Return pictures of N captions, an array (N, 64, 64, 3) of uint8, and the N scenes that the pictures show.

    Picture i is drawn by `draw_scene` with the seed `seed + i`.
    """
    drawn = [draw_scene(caption, seed + i, split) for i, caption in enumerate(captions)]
    return np.stack([np.asarray(picture) for picture, _ in drawn]), [scene for _, scene in drawn]


def _spots(scene: Scene, rng: random.Random) -> list[Spot]:
    """Return where the things stand, those farther away first."""
    if scene.second is None:
        scale = SCALE[str(scene.first.size)] * rng.uniform(0.94, 1.06)
        centre = CANVAS * (CENTRES[str(scene.place)] + rng.uniform(-0.025, 0.025))
        x = min(max(centre, scale * 1.04), CANVAS - scale * 1.04)
        return [Spot(scene.first, x, _ground(scene.first, rng), scale)]
    if scene.relation in ("left of", "right of"):
        things = scene.things if scene.relation == "left of" else scene.things[::-1]
        spots = []
        for thing, centre in zip(things, (0.26, 0.74), strict=True):
            scale = SCALE[str(thing.size)] * IN_PAIRS * rng.uniform(0.94, 1.06)
            x = CANVAS * (centre + rng.uniform(-0.03, 0.03))
            spots.append(Spot(thing, x, _ground(thing, rng), scale))
        return sorted(spots, key=lambda spot: spot.y)
    front, behind = scene.things if scene.relation == "in front of" else scene.things[::-1]
    x, y = CANVAS * rng.uniform(0.38, 0.62), CANVAS * rng.uniform(0.8, 0.84)
    shift = rng.choice((-1, 1)) * CANVAS * rng.uniform(0.1, 0.17)
    scales = [SCALE[size] * rng.uniform(0.95, 1.05) for size in ("large", "small")]
    return [Spot(behind, x, y, scales[0]), Spot(front, x + shift, CANVAS * rng.uniform(0.94, 0.97), scales[1] * 1.06)]


def _ground(thing: Thing, rng: random.Random) -> float:
    low, high = (0.84, 0.94) if thing.size == "large" else (0.74, 0.92)
    return CANVAS * rng.uniform(low, high)


def _paint_thing(canvas: Image.Image, spot: Spot, swimming: bool, rng: random.Random) -> None:
    """Paint a thing and its shadow on the ground; in the sea there are no shadows."""
    draw, colour = ImageDraw.Draw(canvas), jitter(rng, PALETTE[str(spot.thing.colour)], 8)
    x, y, scale = spot.x, spot.y, spot.scale
    if not swimming:
        place = (int(min(max(x, 0), CANVAS - 1)), int(min(y + 4, CANVAS - 1)))
        pixel = canvas.getpixel(place)
        ground = pixel if isinstance(pixel, tuple) else DARK
        shadow = mix((ground[0], ground[1], ground[2]), DARK, 0.3)
        draw.ellipse([x - scale * 0.85, y - scale * 0.13, x + scale * 0.85, y + scale * 0.13], fill=shadow)
    sketch = Sketch(mirrored=rng.random() < 0.5)
    SKETCHES[spot.thing.noun](sketch, colour)
    lift = FLYING.get(spot.thing.noun, 0.0) * scale * rng.uniform(0.5, 1.2)
    rim = mix(colour, DARK, 0.72) if spot.thing.colour != "black" else (132, 128, 142)
    sketch.paint(draw, x, y - lift, scale, RIM, rim)
