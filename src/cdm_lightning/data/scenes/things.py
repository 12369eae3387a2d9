"""The things of the storybook scenes as lists of simple shapes, to be painted with an outline at any place and scale.

In the coordinates of the shapes, a thing stands on the point (0, 0) and is about 2 units high, and y grows downwards.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]
DARK, WINDOW, WOOD, CREAM = (30, 26, 36), (255, 238, 160), (112, 76, 46), (250, 240, 220)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return the colour between `a` and `b` that is the fraction `share` of the way from `a` to `b`."""
    return (
        int(a[0] + (b[0] - a[0]) * share),
        int(a[1] + (b[1] - a[1]) * share),
        int(a[2] + (b[2] - a[2]) * share),
    )


def darker(colour: Colour, share: float = 0.35) -> Colour:
    """Return `colour`, moved by the fraction `share` towards a nearly black colour."""
    return mix(colour, DARK, share)


def lighter(colour: Colour, share: float = 0.45) -> Colour:
    """Return `colour`, moved by the fraction `share` towards white."""
    return mix(colour, (255, 255, 255), share)


@dataclass
class Sketch:
    """The shapes of one thing, from back to front. The unit of length is about half the height of a thing.

    With `mirrored`, left and right are exchanged.
    """

    mirrored: bool = False
    shapes: list[tuple[str, list[Point], Colour, float]] = field(default_factory=list)

    def _add(self, kind: str, points: Sequence[Point], colour: Colour, width: float = 0.0) -> None:
        sign = -1 if self.mirrored else 1
        self.shapes.append((kind, [(sign * x, y) for x, y in points], colour, width))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Add a filled ellipse with the centre (x, y) and the radii `rx` (horizontal) and `ry` (vertical)."""
        self._add("ellipse", [(x - rx, y - ry), (x + rx, y + ry)], colour)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Add a filled polygon with the corners `points`."""
        self._add("polygon", points, colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Add a filled rectangle from x = `left` to `right` and from y = `top` to `bottom`. y grows downwards."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """Add a line of the width `width` through `points`."""
        self._add("line", points, colour, width)

    def paint(
        self, draw: ImageDraw.ImageDraw, x: float, y: float, scale: float, rim: float, rim_colour: Colour
    ) -> None:
        """Paint the thing with `draw` so that it stands on the pixel (x, y), with `scale` pixels per unit of length.

        The thing gets an outline that is `rim` pixels wide and has the colour `rim_colour`.
        """
        placed = [
            (kind, [(x + px * scale, y + py * scale) for px, py in points], colour, width * scale)
            for kind, points, colour, width in self.shapes
        ]
        for edge in (rim, 0.0):
            for kind, points, own, width in placed:
                _paint(draw, kind, points, rim_colour if edge else own, width, edge)


def _paint(draw: Any, kind: str, points: list[Point], colour: Colour, width: float, edge: float) -> None:
    if kind == "ellipse":
        (x0, y0), (x1, y1) = points
        left, right = min(x0, x1), max(x0, x1)
        draw.ellipse([left - edge, y0 - edge, right + edge, y1 + edge], fill=colour)
    elif kind == "polygon":
        draw.polygon(points, fill=colour)
        if edge:
            draw.line([*points, points[0], points[1]], fill=colour, width=round(2 * edge), joint="curve")
    else:
        draw.line(
            points, fill=colour, width=max(1, round(width + (edge if width < 2 * edge else 2 * edge))), joint="curve"
        )


def house(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a house: walls of the colour `c`, a dark roof, a door and two lit windows."""
    s.box(0.4, -1.9, 0.64, -1.4, darker(c, 0.5))
    s.box(-0.8, -1.1, 0.8, 0, c)
    s.polygon([(-1, -1.05), (0, -1.95), (1, -1.05)], darker(c, 0.45))
    s.box(-0.19, -0.62, 0.19, 0, WOOD)
    s.box(-0.66, -0.86, -0.32, -0.46, WINDOW)
    s.box(0.32, -0.86, 0.66, -0.46, WINDOW)


def tree(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a tree: a brown trunk and a round crown of the colour `c`."""
    s.polygon([(-0.13, -0.9), (0.13, -0.9), (0.2, 0), (-0.2, 0)], WOOD)
    for x, y, r in ((-0.45, -1.05, 0.42), (0.45, -1.05, 0.42), (0, -1.5, 0.52), (0, -0.98, 0.42)):
        s.ellipse(x, y, r, r, c)
    for x, y, r in ((-0.45, -1.2, 0.16), (0.05, -1.72, 0.2), (0.4, -1.1, 0.13)):
        s.ellipse(x, y, r, r, lighter(c, 0.3))


def fish(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a fish of the colour `c`, which swims above the ground."""
    s.polygon([(-0.5, -0.85), (-1.1, -1.35), (-0.95, -0.85), (-1.1, -0.35)], darker(c, 0.25))
    s.polygon([(-0.3, -1.2), (0.1, -1.62), (0.3, -1.25)], darker(c, 0.25))
    s.ellipse(0.12, -0.85, 0.82, 0.5, c)
    s.ellipse(0.12, -0.66, 0.5, 0.22, lighter(c))
    s.line([(0.24, -1.25), (0.36, -0.85), (0.24, -0.48)], darker(c, 0.3), 0.07)
    s.ellipse(0.58, -1.0, 0.16, 0.16, (255, 255, 255))
    s.ellipse(0.62, -1.0, 0.08, 0.08, DARK)


def boat(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a sailing boat: a hull and a small sail of the colour `c`, and a large sail in cream."""
    s.box(-0.05, -1.95, 0.05, -0.5, WOOD)
    s.polygon([(0.12, -1.9), (0.12, -0.66), (0.85, -0.66)], CREAM)
    s.polygon([(-0.12, -1.65), (-0.12, -0.66), (-0.7, -0.66)], c)
    s.polygon([(-1, -0.55), (1, -0.55), (0.62, 0), (-0.62, 0)], c)
    s.polygon([(-1, -0.55), (1, -0.55), (0.93, -0.4), (-0.93, -0.4)], darker(c, 0.4))


def car(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a car of the colour `c`, seen from its side, with two windows and two wheels."""
    glass = (190, 228, 246)
    s.polygon([(-0.7, -0.75), (-0.48, -1.4), (0.4, -1.4), (0.72, -0.75)], c)
    s.polygon([(-1.02, -0.82), (0.85, -0.82), (1.05, -0.6), (1.05, -0.22), (-1.02, -0.22)], c)
    s.polygon([(-0.52, -0.82), (-0.38, -1.26), (-0.06, -1.26), (-0.06, -0.82)], glass)
    s.polygon([(0.06, -0.82), (0.06, -1.26), (0.34, -1.26), (0.54, -0.82)], glass)
    s.box(0.88, -0.6, 1.04, -0.42, WINDOW)
    for x in (-0.55, 0.55):
        s.ellipse(x, -0.24, 0.28, 0.28, (36, 34, 40))
        s.ellipse(x, -0.24, 0.12, 0.12, (206, 206, 212))


def flower(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a flower: a stem, two leaves, and six petals of the colour `c` around a centre."""
    stem, near_yellow = (54, 124, 52), c[0] > 200 and c[1] > 120 and c[2] < 100
    s.line([(0, -1.2), (0, 0)], stem, 0.13)
    s.polygon([(0, -0.2), (0.5, -0.62), (0.56, -0.3)], stem)
    s.polygon([(0, -0.1), (-0.5, -0.5), (-0.56, -0.18)], stem)
    for k in range(6):
        angle = (k + 0.5) * math.pi / 3
        s.ellipse(0.42 * math.cos(angle), -1.32 + 0.42 * math.sin(angle), 0.28, 0.28, c if k % 2 else lighter(c, 0.22))
    s.ellipse(0, -1.32, 0.25, 0.25, (136, 78, 36) if near_yellow else (252, 210, 70))


def mushroom(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a mushroom: a pale stalk, and a cap of the colour `c` with pale dots."""
    s.polygon([(-0.26, -0.9), (0.26, -0.9), (0.36, 0), (-0.36, 0)], CREAM)
    cap = [(0.95 * math.cos(a), -0.85 - 1.0 * math.sin(a)) for a in (k * math.pi / 16 for k in range(17))]
    s.polygon(cap, c)
    dot = CREAM if sum(c) < 690 else (206, 196, 190)
    for x, y, r in ((-0.45, -1.2, 0.17), (0.12, -1.52, 0.19), (0.58, -1.12, 0.13)):
        s.ellipse(x, y, r, r, dot)


def balloon(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a balloon of the colour `c`, which floats on a string."""
    s.line([(0, -0.75), (0.1, -0.5), (-0.06, -0.25), (0.04, 0)], (86, 82, 88), 0.06)
    s.polygon([(-0.14, -0.62), (0.14, -0.62), (0, -0.82)], darker(c, 0.3))
    s.ellipse(0, -1.38, 0.58, 0.64, c)
    s.ellipse(-0.22, -1.6, 0.14, 0.2, lighter(c, 0.6))


def cat(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a sitting cat of the colour `c`, with pointed ears, yellow eyes and a tail."""
    s.line([(0.4, -0.14), (0.86, -0.2), (0.98, -0.6), (0.8, -0.92)], darker(c, 0.22), 0.2)
    s.ellipse(0, -0.48, 0.56, 0.48, c)
    s.polygon([(-0.56, -1.3), (-0.52, -1.98), (-0.1, -1.6)], c)
    s.polygon([(0.56, -1.3), (0.52, -1.98), (0.1, -1.6)], c)
    s.ellipse(0, -1.24, 0.6, 0.46, c)
    s.ellipse(0, -0.36, 0.28, 0.26, lighter(c, 0.4))
    for x in (-0.25, 0.25):
        s.ellipse(x, -1.3, 0.14, 0.15, (250, 236, 120))
        s.ellipse(x, -1.3, 0.06, 0.13, DARK)
    s.polygon([(-0.09, -1.1), (0.09, -1.1), (0, -0.98)], (226, 110, 130))


def bird(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a standing bird of the colour `c`: round body, beak, wing, and two thin legs."""
    for x in (-0.15, 0.2):
        s.line([(x, -0.45), (x, 0)], (214, 128, 40), 0.1)
    s.polygon([(-0.5, -0.7), (-1.08, -1.12), (-1.0, -0.62)], darker(c, 0.35))
    s.ellipse(0, -0.75, 0.68, 0.46, c)
    s.polygon([(0.7, -1.5), (1.12, -1.32), (0.7, -1.18)], (244, 160, 40))
    s.ellipse(0.46, -1.34, 0.38, 0.38, c)
    s.ellipse(-0.16, -0.74, 0.36, 0.22, darker(c, 0.35))
    s.ellipse(0.56, -1.42, 0.12, 0.12, (255, 255, 255))
    s.ellipse(0.58, -1.42, 0.06, 0.06, DARK)


def cup(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a cup of the colour `c`, with a handle and steam."""
    s.line([(0.5, -0.98), (0.92, -0.92), (0.92, -0.45), (0.48, -0.34)], darker(c, 0.15), 0.16)
    s.polygon([(-0.65, -1.15), (0.65, -1.15), (0.48, 0), (-0.48, 0)], c)
    s.polygon([(-0.46, -0.95), (-0.28, -0.95), (-0.22, -0.15), (-0.36, -0.15)], lighter(c))
    s.ellipse(0, -1.15, 0.65, 0.19, darker(c, 0.3))
    s.ellipse(0, -1.13, 0.5, 0.12, (84, 50, 32))
    for x in (-0.24, 0.2):
        s.line([(x, -1.42), (x + 0.1, -1.6), (x - 0.04, -1.78), (x + 0.06, -1.96)], (244, 244, 246), 0.1)


def butterfly(s: Sketch, c: Colour) -> None:
    """Add to `s` the shapes of a flying butterfly: a body, two feelers, and four wings of the colour `c`."""
    for sign in (-1, 1):
        s.line([(0, -1.5), (sign * 0.3, -1.95)], DARK, 0.08)
        s.ellipse(sign * 0.46, -0.72, 0.36, 0.42, darker(c, 0.25))
        s.ellipse(sign * 0.55, -1.3, 0.46, 0.46, c)
        s.ellipse(sign * 0.6, -1.34, 0.17, 0.17, CREAM if sum(c) < 690 else (206, 196, 190))
    s.ellipse(0, -1.0, 0.12, 0.6, (58, 44, 50))


SKETCHES: dict[str, Callable[[Sketch, Colour], None]] = {
    sketch.__name__: sketch
    for sketch in (house, tree, fish, boat, car, flower, mushroom, balloon, cat, bird, cup, butterfly)
}
FLYING = {"balloon": 0.35, "butterfly": 0.3, "fish": 0.1}  # how high above the ground, in units
