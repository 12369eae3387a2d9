"""The settings of the storybook scenes: painted backgrounds such as a beach.

All lengths are in pixels of the canvas (256 x 256). In the painting functions, `horizon` is the row of pixels where the
ground begins, and `rng` varies the colours and the details.
"""

import math
import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw

from cdm_lightning.data.scenes.things import Colour, mix

CANVAS = 256  # the side of the canvas on which scenes are drawn, before they are made smaller


def jitter(rng: random.Random, colour: Colour, amount: int = 10) -> Colour:
    """Return the colour with each channel changed by a random amount of at most `amount`."""
    red, green, blue = (max(0, min(255, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def _shade(draw: Any, top: Colour, bottom: Colour, begin: int, end: int) -> None:
    """Fill the rows from `begin` to `end` with a gradient, in bands of four rows."""
    for y in range(begin, end, 4):
        draw.rectangle([0, y, CANVAS, y + 3], fill=mix(top, bottom, (y - begin) / max(1, end - begin)))


def _hill(draw: Any, rng: random.Random, horizon: int, colour: Colour) -> None:
    x, height = rng.randint(20, CANVAS - 20), rng.randint(24, 56)
    draw.ellipse([x - 120, horizon - height, x + 120, horizon + height], fill=colour)


def _cloud(draw: Any, rng: random.Random, lowest: int) -> None:
    x, y = rng.randint(10, CANVAS - 10), rng.randint(22, max(23, lowest))
    for shift, radius in ((-22, 12), (-4, 18), (16, 14), (32, 9)):
        draw.ellipse([x + shift - radius, y - radius, x + shift + radius, y + radius * 0.7], fill=(252, 252, 254))


def meadow(draw: Any, rng: random.Random, horizon: int) -> None:
    """Paint a meadow with tufts of grass from the row `horizon` down. Above this row, paint a hill and a cloudy sky."""
    _shade(draw, jitter(rng, (112, 184, 242)), jitter(rng, (204, 232, 250)), 0, horizon)
    _hill(draw, rng, horizon, jitter(rng, (116, 178, 92)))
    for _ in range(rng.randint(1, 2)):
        _cloud(draw, rng, horizon - 90)
    _shade(draw, jitter(rng, (126, 196, 88)), jitter(rng, (84, 152, 62)), horizon, CANVAS)
    for _ in range(rng.randint(5, 9)):
        x, y = rng.randint(0, CANVAS), rng.randint(horizon + 16, CANVAS)
        draw.line([(x - 5, y - 9), (x, y), (x + 5, y - 9)], fill=(62, 122, 50), width=4)


def beach(draw: Any, rng: random.Random, horizon: int) -> None:
    """Paint sand with shells from the row `horizon` down. Above this row, paint a strip of sea and a sunny sky."""
    shore = horizon - 46
    _shade(draw, jitter(rng, (138, 202, 248)), jitter(rng, (224, 242, 252)), 0, shore)
    x, y = rng.randint(24, CANVAS - 24), rng.randint(30, 52)
    draw.ellipse([x - 21, y - 21, x + 21, y + 21], fill=(255, 226, 96))
    _shade(draw, jitter(rng, (34, 118, 184)), jitter(rng, (84, 184, 206)), shore, horizon)
    _shade(draw, jitter(rng, (244, 224, 168)), jitter(rng, (222, 190, 128)), horizon, CANVAS)
    draw.line([(x, horizon + 4 * math.sin(x / 22)) for x in range(0, CANVAS + 8, 8)], fill=(248, 252, 252), width=7)
    for _ in range(rng.randint(3, 6)):
        x, y = rng.randint(0, CANVAS), rng.randint(horizon + 16, CANVAS)
        draw.ellipse([x - 5, y - 4, x + 5, y + 4], fill=(250, 246, 232))


def night(draw: Any, rng: random.Random, horizon: int) -> None:
    """Paint blue-green land from the row `horizon` down. Above this row, paint a sky with stars and a crescent moon."""
    top, bottom = jitter(rng, (22, 26, 74)), jitter(rng, (62, 66, 128))
    _shade(draw, top, bottom, 0, horizon)
    _hill(draw, rng, horizon, jitter(rng, (46, 72, 98)))
    for _ in range(rng.randint(9, 15)):
        x, y, radius = rng.randint(0, CANVAS), rng.randint(4, horizon - 50), rng.randint(3, 5)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(255, 250, 214))
    x, y = rng.randint(28, CANVAS - 28), rng.randint(32, 56)
    draw.ellipse([x - 23, y - 23, x + 23, y + 23], fill=(252, 244, 200))
    draw.ellipse([x - 11, y - 29, x + 29, y + 15], fill=mix(top, bottom, y / horizon))
    _shade(draw, jitter(rng, (58, 98, 104)), jitter(rng, (40, 70, 84)), horizon, CANVAS)


def snow(draw: Any, rng: random.Random, horizon: int) -> None:
    """Paint white ground from the row `horizon` down. Above this row, paint firs and a grey sky. Add falling flakes."""
    _shade(draw, jitter(rng, (150, 174, 204)), jitter(rng, (206, 218, 234)), 0, horizon)
    for _ in range(rng.randint(2, 4)):
        x, height = rng.randint(0, CANVAS), rng.randint(34, 54)
        fir = [(x - height * 0.36, horizon + 4), (x, horizon - height), (x + height * 0.36, horizon + 4)]
        draw.polygon(fir, fill=jitter(rng, (98, 130, 144)))
    _shade(draw, jitter(rng, (246, 249, 253), 4), jitter(rng, (212, 224, 242), 6), horizon, CANVAS)
    for _ in range(rng.randint(14, 24)):
        x, y = rng.randint(0, CANVAS), rng.randint(0, CANVAS)
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=(255, 255, 255))


def desert(draw: Any, rng: random.Random, horizon: int) -> None:
    """Paint sand from the row `horizon` down. Above this row, paint a dune, a cactus and a hot orange sky."""
    _shade(draw, jitter(rng, (248, 176, 96)), jitter(rng, (254, 226, 170)), 0, horizon)
    x, height = rng.randint(0, CANVAS), rng.randint(30, 62)
    draw.polygon(
        [(x - 140, horizon + 4), (x, horizon - height), (x + 140, horizon + 4)], fill=jitter(rng, (214, 150, 90))
    )
    _shade(draw, jitter(rng, (224, 160, 88)), jitter(rng, (190, 122, 64)), horizon, CANVAS)
    x, green = rng.randint(16, CANVAS - 16), (92, 128, 74)
    draw.line([(x, horizon + 10), (x, horizon - 34)], fill=green, width=10)
    draw.line([(x - 15, horizon - 24), (x - 15, horizon - 10), (x, horizon - 10)], fill=green, width=7)
    draw.line([(x + 15, horizon - 30), (x + 15, horizon - 17), (x, horizon - 17)], fill=green, width=7)
    for _ in range(2):
        y = rng.randint(horizon + 14, CANVAS - 8)
        wave = [(x, y + 5 * math.sin(x / 26 + y)) for x in range(0, CANVAS + 8, 8)]
        draw.line(wave, fill=(176, 112, 58), width=4)


def sea(draw: Any, rng: random.Random, horizon: int) -> None:
    """Paint the bottom of the sea: water that darkens with depth, sand, seaweed and bubbles. `horizon` is ignored."""
    floor = CANVAS - rng.randint(30, 44)
    _shade(draw, jitter(rng, (74, 182, 214)), jitter(rng, (18, 82, 150)), 0, floor)
    _shade(draw, jitter(rng, (204, 186, 132)), jitter(rng, (164, 142, 98)), floor, CANVAS)
    for _ in range(rng.randint(2, 4)):
        x, height, phase = rng.randint(4, CANVAS - 4), rng.randint(40, 90), rng.random() * 6
        weed = [(x + 7 * math.sin(phase + k), floor + 8 - height * k / 6) for k in range(7)]
        draw.line(weed, fill=jitter(rng, (34, 122, 92)), width=9, joint="curve")
    for _ in range(rng.randint(6, 10)):
        x, y, radius = rng.randint(0, CANVAS), rng.randint(0, floor - 10), rng.randint(5, 9)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=(214, 242, 250), width=3)


BACKDROPS: dict[str, Callable[[Any, random.Random, int], None]] = {
    backdrop.__name__: backdrop for backdrop in (meadow, beach, night, snow, desert, sea)
}


def paint_setting(name: str, rng: random.Random) -> Image.Image:
    """Return a new canvas (256 x 256 pixels, RGB) on which the setting `name` is painted. `rng` varies the details."""
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    BACKDROPS[name](ImageDraw.Draw(canvas), rng, int(CANVAS * rng.uniform(0.56, 0.66)))
    return canvas
