"""The files that an evaluation writes: a table, the figures, the scores and a picture."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

from cdm_lightning.ends.optional import may_fail
from cdm_lightning.evaluation.ladder import LadderResult, Row
from cdm_lightning.evaluation.pictures import picture
from cdm_lightning.files import replacing, require_replaceable

METRICS, TABLE, SCORES, PICTURE = "metrics.json", "table.md", "scores.csv", "samples.png"
LONGEST_FIRST = 20  # characters of a sampler's name that stays in a table that is too wide
FORMATS = {"seconds_per_image": "{:.4f}"}  # other figures: see `_cell`


def table(rows: Sequence[Row], width: int | None = None) -> str:
    """Return `rows` as an aligned table for a terminal of `width` characters, or of any width.

    A row maps names of columns to values. A missing value is shown as -. If the table is too wide, long names of
    samplers are replaced by numbers, with a legend below, and columns that do not fit follow in further tables.
    """
    columns = _columns(rows)
    cells = [[column.replace("_", " ") for column in columns], *_cells(rows, columns)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    if width is None or sum(widths) + 2 * (len(widths) - 1) <= width:
        return _aligned(cells, widths)
    legend = ""
    if widths[0] > LONGEST_FIRST:
        legend = "\n" + "\n".join(f"[{number}] {row[0]}" for number, row in enumerate(cells[1:], start=1))
        cells = [cells[0], *([f"[{number}]", *row[1:]] for number, row in enumerate(cells[1:], start=1))]
        widths[0] = max(len(row[0]) for row in cells)
    parts, room = [[0]], width - widths[0]
    for column, needed in list(enumerate(widths))[1:]:
        if needed + 2 > room and len(parts[-1]) > 1:
            parts, room = [*parts, [0]], width - widths[0]
        parts[-1].append(column)
        room -= needed + 2
    shown = [_aligned([[row[i] for i in part] for row in cells], [widths[i] for i in part]) for part in parts]
    return "\n\n".join(shown) + legend


def _aligned(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: Sequence[Row]) -> str:
    """Return `rows` as a Markdown table.

    A row maps names of columns to values. A missing value is shown as -.
    """
    columns = _columns(rows)
    heads, rules = [column.replace("_", " ") for column in columns], ["---", *["---:"] * (len(columns) - 1)]
    cells = [[_escaped(cell) for cell in row] for row in [heads, *_cells(rows, columns)]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rules, *cells[1:]]) + "\n"


def _escaped(cell: str) -> str:
    """Return the text of a cell so that Markdown does not end the cell at a | in it."""
    return cell.replace("\\", "\\\\").replace("|", "\\|") if "|" in cell else cell


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns of all rows: metrics in their order, then network calls and seconds per image."""
    found = dict.fromkeys(key for row in rows for key in row)
    last = [key for key in ("network_calls", "seconds_per_image") if key in found]
    return [*(key for key in found if key not in last), *last]


def _cells(rows: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    return [[_cell(column, row.get(column)) for column in columns] for row in rows]


def _cell(column: str, value: object) -> str:
    """Format a value. A number has three decimals below 10 and two from 10 on, unless its column has a format."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return FORMATS.get(column, "{:.3f}" if abs(value) < 10 else "{:.2f}").format(value)


def csv_text(rows: Sequence[Row]) -> str:
    """Return `rows` as comma-separated values with a header line, or "" if there are no rows.

    A row maps names of columns to values. All rows must have the same columns.
    """
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _as_json(row: Row) -> Row:
    """Return a row in which NaN and infinity are replaced by null, because JSON has neither."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def save_report(result: LadderResult, folder: str | Path) -> dict[str, Path]:
    """Write the result of an evaluation into `folder`, and return the paths of the four files, by name.

    - metrics.json: the settings and the figures. It is written last, so it marks a complete evaluation.
    - table.md: the figures as a table.
    - samples.png: the images of the first prompts.
    - scores.csv: a line for each sampler and prompt, to compare two runs prompt by prompt.

    If a file cannot be written, a warning is printed. Its version from an earlier evaluation is deleted nevertheless,
    so that files of two evaluations are never mixed.
    """
    folder = Path(folder)
    paths = {name: folder / name for name in (METRICS, TABLE, SCORES, PICTURE)}
    content = {"settings": result.settings, "rows": [_as_json(row) for row in result.rows]}
    shown = io.BytesIO()
    picture(result.images, result.prompts).save(shown, format="PNG")
    texts = {
        PICTURE: shown.getvalue(),
        SCORES: csv_text(result.scores).encode(),
        TABLE: markdown_table(result.rows).encode(),
        METRICS: (json.dumps(content, indent=2) + "\n").encode(),  # last: it marks the report as complete
    }
    for name, text in texts.items():
        with may_fail(paths[name]):
            folder.mkdir(parents=True, exist_ok=True)
            require_replaceable(paths[name]).unlink(missing_ok=True)
            with replacing(paths[name]) as path:
                path.write_bytes(text)
    return paths
