"""Verdicts on the health of a run, in plain words, from the figures that `callbacks.health` measures.

The thresholds are the constants below. The gap and the cosine are judged against a published run: the project anima_lora,
which also distils by distribution matching, reports a gap of about 0.18 and a cosine of about 0.98 in good runs. All
other thresholds are round numbers that were chosen here; no experiment supports them yet.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

WINDOW = 4  # readings in a window mean; a run is judged from its first full window on
GAP = 0.5  # nearly three times the 0.18 that anima_lora reports
COSINE = 0.9  # below the 0.98 that anima_lora reports
MAGNITUDE = (0.8, 1.25)  # 1 is right: the fake score's velocities are as large as the teacher's
COLOUR = (0.8, 1.25)  # the student's figure divided by the teacher's
GRID = 1.25  # only a more visible grid is a fault
SPREAD = (0.8, 1.25)  # the standard deviation of x0, divided by the teacher's
DIVERSITY = 0.5  # of the teacher's distance between images of one prompt
STEP = 0.01  # the change of the weights in one update, relative to the weights; 0.001 is a usual value

Kind = Literal[
    "not_finite",
    "score_lags",
    "score_turned",
    "score_size",
    "brightness",
    "saturation",
    "contrast",
    "patch_grid",
    "x0_spread",
    "diversity",
    "large_steps",
]


@dataclass(frozen=True)
class Reading:
    """The figures of one measurement by name, and the number of finished iterations at that time."""

    iteration: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Finding:
    """A fault in plain words: its kind, the text, what to change, and the figure behind it.

    `value` is the mean of the figure `figure` over the last window. `since` is the iteration of the first measurement of
    the first window from which on every window showed this fault.
    """

    kind: Kind
    text: str
    advice: str
    figure: str
    value: float
    since: int

    def __str__(self) -> str:
        return f"{self.text} since iteration {self.since} ({self.figure} {self.value:.3g}): {self.advice}"


@dataclass(frozen=True)
class _Rule:
    """A fault that a window mean of `figure` shows when it is above `limit`, or below it if `below` is True."""

    kind: Kind
    figure: str
    limit: float
    below: bool
    text: str
    advice: str

    def holds(self, value: float) -> bool:
        return value < self.limit if self.below else value > self.limit


LEARN_MORE = "raise the fake score's learning rate or its updates per student update"
COLOURS = "lower guidance_scale or the student's learning rate, or take an earlier checkpoint"


def _two_sided(kind: Kind, figure: str, limits: tuple[float, float], low: str, high: str, advice: str) -> list[_Rule]:
    return [
        _Rule(kind, figure, limits[0], True, low, advice),
        _Rule(kind, figure, limits[1], False, high, advice),
    ]


RULES = [
    _Rule("score_lags", "gap_fresh", GAP, False, "the fake score lags", LEARN_MORE),
    _Rule("score_turned", "cosine_fresh", COSINE, True, "the fake score points away from the teacher", LEARN_MORE),
    *_two_sided(
        "score_size",
        "magnitude_fresh",
        MAGNITUDE,
        "the fake score's velocities are too small",
        "the fake score's velocities are too large",
        "lower the student's learning rate, or change the fake score's",
    ),
    *_two_sided(
        "brightness",
        "brightness",
        COLOUR,
        "images darken against the teacher",
        "images brighten against the teacher",
        COLOURS,
    ),
    *_two_sided("saturation", "saturation", COLOUR, "images lose saturation", "saturation grows", COLOURS),
    *_two_sided("contrast", "contrast", COLOUR, "images lose contrast", "contrast grows", COLOURS),
    _Rule("patch_grid", "patch_grid", GRID, False, "the grid of patches becomes visible", COLOURS),
    *_two_sided("x0_spread", "x0_std", SPREAD, "latents shrink", "latents grow", COLOURS),
    _Rule(
        "diversity",
        "diversity",
        DIVERSITY,
        True,
        "diversity collapses",
        "lower guidance_scale, or add +objective/first_step=dp_dmd",
    ),
    _Rule("large_steps", "update_ratio", STEP, False, "the student's steps are large", "lower its learning rate"),
]


def window_mean(readings: Sequence[Reading], figure: str) -> float | None:
    """Return the mean of a figure over the readings that have it, or None if none has it."""
    values = [reading.figures[figure] for reading in readings if figure in reading.figures]
    return sum(values) / len(values) if values else None


def findings(readings: Sequence[Reading], window: int = WINDOW) -> list[Finding]:
    """Return the faults that the last `window` readings show; an empty list means healthy.

    Values that are not finite are reported at once. All other faults are reported from the first full window on.
    """
    found = _not_finite(readings[-window:])
    if found or len(readings) < window:
        return found
    return [finding for rule in RULES if (finding := _judge(rule, readings, window)) is not None]


def verdict(readings: Sequence[Reading], found: Sequence[Finding], window: int = WINDOW) -> str:
    """Return the findings in one line, or "healthy", or that it is too early to tell."""
    if found:
        return "; ".join(map(str, found))
    return "healthy" if len(readings) >= window else f"too early to tell ({len(readings)} of {window} measurements)"


def _not_finite(readings: Sequence[Reading]) -> list[Finding]:
    for reading in readings:
        lost = [name for name, value in reading.figures.items() if not math.isfinite(value)]
        skipped = reading.figures.get("skipped_steps", 0.0)
        if not lost and not skipped:
            continue
        figure = lost[0] if lost else "skipped_steps"
        text = "figures are not finite" if lost else "gradients are not finite"
        advice = "lower the learning rates, and look at the first iteration with skipped steps"
        return [Finding("not_finite", text, advice, figure, reading.figures[figure], reading.iteration)]
    return []


def _judge(rule: _Rule, readings: Sequence[Reading], window: int) -> Finding | None:
    last: float | None = None
    since = 0
    for end in range(len(readings), window - 1, -1):
        mean = window_mean(readings[end - window : end], rule.figure)
        if mean is None or not rule.holds(mean):
            break
        last = mean if last is None else last
        since = readings[end - window].iteration
    return None if last is None else Finding(rule.kind, rule.text, rule.advice, rule.figure, last, since)
