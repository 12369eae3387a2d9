"""The plots of the page report.html as numbers: where lines, points and labels lie. The page's template draws them as SVG.

Each figure has a plot over the network calls for an image (a ladder), and one over the guidance scale.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 460, 280  # of a plot, in units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 40  # margins
MOST_LABELS = 9  # on the axis below
APART = 4  # between points of several lines at the same place, so that their intervals can be told apart
SMALLEST, LARGEST = 1e-100, 1e100  # of numbers that are drawn, so that no power of 10 overflows
STEP_FACTORS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Point:
    """A figure at `x`, with its interval from `low` to `high` if it has one, and a sentence that says what it is."""

    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """The points of one line, from left to right. `key` chooses its colour and the shape of its points."""

    name: str
    key: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Label:
    """A text at a place of an axis, in units of the viewBox."""

    place: float
    text: str


@dataclass(frozen=True)
class Plot:
    """A drawn plot. All places are in units of the viewBox, `WIDTH` x `HEIGHT`.

    `lines` are the lines with their points, whose x, y, low and high are places. `levels` are horizontal lines across
    the plot, for what has no place on the axis below, such as real images.
    """

    title: str
    axis: str
    lines: list[Line]
    levels: list[Line] = field(default_factory=list)
    below: list[Label] = field(default_factory=list)
    beside: list[Label] = field(default_factory=list)


def plot(
    title: str, axis: str, lines: Sequence[Line], levels: Sequence[Line] = (), is_log: bool = False, ticks: bool = False
) -> Plot | None:
    """Return a plot of `lines`, or None if they have no finite points.

    With `is_log`, equal distances on the axis below are equal ratios. With `ticks`, the axis has round numbers, and
    otherwise the places of the points.
    """
    lines = [Line(line.name, line.key, [point for point in line.points if _is_finite(point)]) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    heights = [point for line in levels for point in line.points if _is_finite(point)]
    ends = [
        y
        for point in [*points, *heights]
        for y in (point.y, point.low, point.high)
        if y is not None and abs(y) < LARGEST
    ]
    xs = sorted({point.x for point in points})
    beside = round_numbers(min(ends), max(ends))
    across, up = _scale(xs, LEFT, WIDTH - RIGHT, is_log), _between(beside[0], beside[-1], HEIGHT - BOTTOM, TOP)

    def placed(line: Line, aside: float = 0.0) -> Line:
        found = [
            Point(
                round(across(point.x) + aside, 1),
                up(point.y),
                point.text,
                *(up(y) if _is_number(y) else None for y in (point.low, point.high)),
            )
            for point in sorted(line.points, key=lambda point: point.x)
        ]
        return Line(line.name, line.key, found)

    drawn = [line for line in lines if line.points]
    apart = APART * min(1, 6 / len(drawn)) if any(point.low is not None for point in points) else 0
    shown = [x for x in round_numbers(xs[0], xs[-1]) if xs[0] <= x <= xs[-1]] if ticks else _thinned(xs, across)
    return Plot(
        title,
        axis,
        [placed(line, (i - (len(drawn) - 1) / 2) * apart) for i, line in enumerate(drawn)],
        [
            placed(Line(line.name, line.key, [Point(xs[0], p.y, p.text) for p in line.points if _is_finite(p)]))
            for line in levels
        ],
        [Label(across(x), number(x)) for x in shown],
        [Label(up(y), number(y)) for y in beside],
    )


def number(value: float) -> str:
    """Return a number for a label: 6 digits at most, and no zeros at the end."""
    return f"{value:.6g}"


def round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers in equal distances, from at most `low` to at least `high`."""
    span, size = high - low, max(abs(low), abs(high))
    if span <= 1e-9 * size or size < SMALLEST:
        span = size * 0.1 if size >= SMALLEST else 1.0
    rough = span / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in STEP_FACTORS if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    return [float(f"{n * step:.10g}") for n in range(first, last + 1)]


def _is_number(value: float | None) -> bool:
    return value is not None and abs(value) < LARGEST


def _is_finite(point: Point) -> bool:
    return abs(point.x) < LARGEST and abs(point.y) < LARGEST


def _between(low: float, high: float, start: float, end: float) -> Callable[[float | None], float]:
    width = high - low or 1.0
    return lambda value: round(start + ((value or 0.0) - low) / width * (end - start), 1)


def _scale(xs: Sequence[float], start: float, end: float, is_log: bool) -> Callable[[float], float]:
    """Return a function from a number on the axis below to its place, with some room at both ends."""
    bend: Callable[[float], float] = (lambda x: math.log2(max(x, 1e-9))) if is_log else (lambda x: x)
    low, high = bend(xs[0]), bend(xs[-1])
    room = (high - low) * 0.04 or 1.0
    place = _between(low - room, high + room, start, end)
    return lambda x: place(bend(x))


def _thinned(xs: Sequence[float], across: Callable[[float], float]) -> list[float]:
    """Return those of `xs` whose labels do not touch."""
    apart, found = (WIDTH - LEFT - RIGHT) / MOST_LABELS * 0.7, list[float]()
    for x in xs:
        if not found or across(x) - across(found[-1]) >= apart:
            found.append(x)
    return found


def sparse(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most `most` of the points, in equal distances, and always the last one."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def grouped(names: Mapping[str, tuple]) -> dict[tuple, list[str]]:
    """Return the names by the value to which they are mapped, in their order."""
    found: dict[tuple, list[str]] = {}
    for name, group in names.items():
        found.setdefault(group, []).append(name)
    return found
