"""The page report.html: an evaluation as one file that needs no network and no other file.

A *sampler* is a way to make images: a model, a number of steps, a guidance scale and a shift. A *line* of the page is
the samplers of one model that differ in their number of steps alone.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cdm_lightning.config import asset_path
from cdm_lightning.evaluation.intervals import Comparison, Interval
from cdm_lightning.evaluation.ladder import LadderResult, Row
from cdm_lightning.evaluation.page_images import Card, Shot, choose, with_addresses
from cdm_lightning.evaluation.plots import Label, Line, Plot, Point, grouped, number, plot, sparse
from cdm_lightning.evaluation.report import _cell, _columns
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.files import read_text, replacing, require_replaceable

PAGE = "report.html"
MOST_BYTES = 4_800_000  # of the file, whatever the number and size of the images
MOST_CONFIG = 150_000  # characters of the configuration
MOST_CURVES, MOST_POINTS = 30, 200
COLOURS = 8
COSTS = ("sampler", "network_calls", "seconds_per_image")  # columns that are no figures
KEPT = "\u200c\u200d"  # joiners, which some scripts need


@dataclass(frozen=True)
class Setting:
    """What a sampler is: the name of its model, and its steps (None for images that were not made here), guidance and shift."""

    model: str
    steps: int | None = None
    guidance: float = 1.0
    shift: float | None = None

    @classmethod
    def of(cls, spec: SamplerSpec, model: str) -> "Setting":
        """Return the setting of a sampler of the model with the name `model`."""
        return cls(model, spec.nfe, spec.guidance_scale, spec.shift) if spec.is_made_here else cls(model)

    @property
    def line(self) -> str:
        """The name of the line of the page to which the sampler belongs."""
        name = self.model + ("" if self.guidance == 1 else f", guidance {self.guidance:g}")
        return name + ("" if self.shift is None else f", shift {self.shift:g}")


@dataclass(frozen=True)
class Page:
    """The contents of a page.

    - `title`: its heading.
    - `ladder`: the figures and the measurements with the small images.
    - `settings`: what each sampler of `ladder` is, by name. A sampler that is missing, such as real images, has no steps.
    - `comparison`: the intervals and the differences to the sampler `baseline`, or None if there are none.
    - `command`: the command that made the page, or "".
    - `facts`: pairs of a name and a text: date, versions, hashes of weights, and so on.
    - `cautions`: what a reader must know.
    - `curves`: names of curves of a training run, with their points (iteration, value).
    - `configuration`: the resolved configuration as text.
    """

    title: str
    ladder: LadderResult
    settings: Mapping[str, Setting]
    comparison: Comparison | None = None
    baseline: str = ""
    command: str = ""
    facts: Sequence[tuple[str, str]] = ()
    cautions: Sequence[str] = ()
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    configuration: str = ""

    def setting(self, sampler: str) -> Setting:
        """Return what a sampler is."""
        return self.settings.get(sampler, Setting(sampler))


def save_page(page: Page, folder: Path) -> Path:
    """Write the page as report.html into `folder`, completely or not at all, and return its path.

    Raises OSError if it cannot be written.
    """
    remove_page(folder)
    with replacing(folder / PAGE) as temporary:
        temporary.write_bytes(render(page).encode())
    return folder / PAGE


def remove_page(folder: Path) -> None:
    """Delete the page of an earlier evaluation, which would not fit the other files. Raises OSError if it is no file."""
    require_replaceable(folder / PAGE).unlink(missing_ok=True)


def render(page: Page) -> str:
    """Return the page as HTML of at most `MOST_BYTES` bytes, with its images reduced as far as that needs."""
    environment = Environment(
        loader=FileSystemLoader(asset_path("report")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    template, content = environment.get_template("report.html.jinja"), _content(page)
    for cards in choose(page.ladder, list(content["lines"])):
        largest = max((shot.width for card in cards for shot in card.shots), default=0)
        content |= {"cards": cards, "side": None, "largest": largest}
        room = MOST_BYTES - len(template.render(content).encode())
        if (found := with_addresses(cards, room)) is not None:
            content |= {"cards": found[0], "side": found[1]}
            return template.render(content)
    raise AssertionError("a page without images must be made in any case")


def plain(text: str) -> str:
    """Return a text in which characters that cannot be seen, such as those that turn the direction of writing, are replaced."""
    return "".join(letter if letter.isprintable() or letter in KEPT or letter == "\n" else "\ufffd" for letter in text)


def _content(page: Page) -> dict[str, Any]:
    """Return what the template shows."""
    style, script = (read_text(asset_path(f"report/{name}")) for name in ("report.css", "report.js"))
    names = [str(row["sampler"]) for row in page.ladder.rows]
    keys = {line: number for number, line in enumerate(dict.fromkeys(page.setting(name).line for name in names))}
    figures = [column for column in _columns(page.ladder.rows) if column not in COSTS]
    configuration = page.configuration
    if len(configuration) > MOST_CONFIG:
        configuration = configuration[:MOST_CONFIG] + "\n... (cut here)"
    return {
        "page": page,
        "style": style,
        "script": script,
        "hashes": {"style": _hash(style), "script": _hash(script)},
        "lines": {name: keys[page.setting(name).line] for name in names},
        "keys": keys,
        "samplers": {name: (page.setting(name), _calls(page, name)) for name in names},
        "prompts": _count(page),
        "reference": max(names, key=lambda name: page.setting(name).steps or 0),
        "figures": _figures(page),
        "differences": _differences(page),
        "ladders": [found for figure in figures if (found := _ladder(page, figure, keys)) is not None],
        "guidance": [found for figure in figures if (found := _guidance(page, figure)) is not None],
        "guidance_keys": _guidance_keys(page),
        "curves": _curves(page),
        "configuration": configuration,
        "colours": COLOURS,
    }


def _hash(text: str) -> str:
    """Return the hash of an inline style or script, as a Content-Security-Policy writes it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _count(page: Page) -> int:
    sizes = [len(found.collected.prompts) for found in page.ladder.measured.values()]
    return int(page.ladder.settings.get("count") or max(sizes, default=0))


def _calls(page: Page, sampler: str) -> float | None:
    row = next(row for row in page.ladder.rows if row["sampler"] == sampler)
    return row.get("network_calls") if page.setting(sampler).steps else None


# ---- tables


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the interval below it, and whether the interval does not contain 0."""

    text: str
    interval: str = ""
    is_clear: bool = False


@dataclass(frozen=True)
class Table:
    """A table: heads of columns, and rows of a name and cells."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def _figures(page: Page) -> Table:
    """Return the table of all figures, with their intervals."""
    columns = [column for column in _columns(page.ladder.rows) if column != "sampler"]
    rows = []
    for row in page.ladder.rows:
        known = page.comparison.figures.get(row["sampler"], {}) if page.comparison else {}
        cells = [Cell(_cell(column, row.get(column)), _range(known.get(column))) for column in columns]
        rows.append((str(row["sampler"]), cells))
    return Table([_title(column) for column in columns], rows)


def _differences(page: Page) -> Table | None:
    """Return the table of the differences to the baseline, or None if there are none."""
    found = page.comparison.differences if page.comparison else {}
    columns = [column for column in _columns(page.ladder.rows) if any(column in row for row in found.values())]
    if not columns:
        return None
    rows = [(name, [_gap(row.get(column)) for column in columns]) for name, row in found.items() if row]
    return Table([_title(column) for column in columns], rows)


def _gap(found: Interval | None) -> Cell:
    if found is None:
        return Cell("-")
    return Cell(f"{found.value:+.3g}", _range(found), found.low > 0 or found.high < 0)


def _range(found: Interval | None) -> str:
    return f"{found.low:.3g} to {found.high:.3g}" if found and math.isfinite(found.low) else ""


def _title(column: str) -> str:
    return column.replace("_", " ")


# ---- plots


def _points(page: Page, figure: str, rows: Sequence[Row], places: Mapping[str, float]) -> list[Point]:
    """Return the points of a figure, for the samplers in `rows` that have it."""
    found = []
    for row in rows:
        name, value = str(row["sampler"]), row.get(figure)
        if not isinstance(value, int | float):
            continue
        known = page.comparison.figures.get(name, {}).get(figure) if page.comparison else None
        text = f"{name}: {_title(figure)} {_cell(figure, float(value))}" + (f" ({_range(known)})" if known else "")
        ends = (known.low, known.high) if known else (None, None)
        found.append(Point(places.get(name, 0.0), float(value), plain(text), *ends))
    return found


def _ladder(page: Page, figure: str, keys: Mapping[str, int]) -> Plot | None:
    """Return the plot of a figure over the network calls, with a line for each model and guidance scale."""
    calls = {name: found for row in page.ladder.rows if (found := _calls(page, name := str(row["sampler"])))}
    lines, levels = [], []
    for line, key in keys.items():
        rows = [row for row in page.ladder.rows if page.setting(row["sampler"]).line == line]
        points = _points(page, figure, rows, calls)
        (lines if any(row["sampler"] in calls for row in rows) else levels).append(Line(line, key, points))
    return plot(_title(figure), "network calls for an image", lines, levels, is_log=True)


def _guidance_keys(page: Page) -> dict[str, int]:
    """Return the lines of the plots over the guidance scale: the samplers that differ in their guidance alone, with a number each."""
    settings = {str(row["sampler"]): page.setting(row["sampler"]) for row in page.ladder.rows}
    parts = {name: (one.model, one.steps, one.shift) for name, one in settings.items() if one.steps}
    several = [group for group, names in grouped(parts).items() if len({settings[name].guidance for name in names}) > 1]
    return {_part_name(*group): key for key, group in enumerate(several)}


def _part_name(model: str, steps: int, shift: float | None) -> str:
    name = f"{model} {steps} {'step' if steps == 1 else 'steps'}"
    return name + ("" if shift is None else f", shift {shift:g}")


def _guidance(page: Page, figure: str) -> Plot | None:
    """Return the plot of a figure over the guidance scale, or None if no model was measured at several of them."""
    rows: dict[str, list[Row]] = {name: [] for name in _guidance_keys(page)}
    for row in page.ladder.rows:
        one = page.setting(row["sampler"])
        if one.steps and (name := _part_name(one.model, one.steps, one.shift)) in rows:
            rows[name].append(row)
    scales = {str(row["sampler"]): page.setting(row["sampler"]).guidance for row in page.ladder.rows}
    lines = [Line(name, key, _points(page, figure, rows[name], scales)) for name, key in _guidance_keys(page).items()]
    return plot(_title(figure), "guidance scale", lines)


def _curves(page: Page) -> list[Plot]:
    """Return plots of the training curves. A point of them has no sentence of its own."""
    found = []
    for name, points in list(page.curves.items())[:MOST_CURVES]:
        some = [Point(x, y, "") for x, y in sparse(points, MOST_POINTS)]
        if (drawn := plot(name, "iteration", [Line(name, 0, some)], ticks=True)) is not None:
            found.append(drawn)
    return found


__all__ = ("PAGE", "Card", "Label", "Page", "Setting", "Shot", "number", "plain", "remove_page", "render", "save_page")
