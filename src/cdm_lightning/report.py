"""What a ladder evaluation leaves behind: a table, its figures as JSON, and a labelled picture.

Shapes: images (P, 3, H, W) in [0, 1].
"""

import json
import textwrap
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cdm_lightning.ladder import LadderResult, LadderRow

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = {  # heading -> (field of LadderRow, format)
    "sampler": ("sampler", "{}"),
    "FD real": ("frechet_real", "{:.3f}"),
    "FD teacher": ("frechet_teacher", "{:.3f}"),
    "CLIP": ("clip_score", "{:.2f}"),
    "adherence": ("adherence", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "calls/image": ("network_calls", "{}"),
    "s/image": ("seconds_per_image", "{:.4f}"),
}
CELL = (96, 256)  # smallest and largest side of an image in the picture, in pixels
MARGIN, LINE, FONT_SIZE = 6, 14, 12  # pixels


def table(rows: Sequence[LadderRow]) -> str:
    """The rows aligned for a terminal."""
    cells = [list(COLUMNS), *_cells(rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: Sequence[LadderRow]) -> str:
    """The rows as a table of Markdown."""
    rules = ["---", *["---:"] * (len(COLUMNS) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(COLUMNS), rules, *_cells(rows)]) + "\n"


def _cells(rows: Sequence[LadderRow]) -> list[list[str]]:
    def cell(row: LadderRow, name: str, form: str) -> str:
        value = getattr(row, name)
        return "-" if value is None else form.format(value)

    return [[cell(row, *column) for column in COLUMNS.values()] for row in rows]


def picture(images: Mapping[str, Tensor], prompts: Sequence[str]) -> "Image":
    """One row a sampler, one column a prompt, with the samplers' names on the left and the prompts on top.

    Small images are enlarged by a whole factor without smoothing, large ones made smaller, all samplers' alike.
    """
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import to_pil_image

    width = max(batch.shape[-1] for batch in images.values())
    scale = max(1, -(-CELL[0] // width)) if width <= CELL[1] else CELL[1] / width
    sizes = {name: (round(batch.shape[-1] * scale), round(batch.shape[-2] * scale)) for name, batch in images.items()}
    cell_w = round(width * scale)
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    font = ImageFont.load_default(FONT_SIZE)
    heads = [_wrap(prompt, font, cell_w) for prompt in prompts]
    left = max(round(font.getlength(name)) for name in images) + 2 * MARGIN
    top = max(len(lines) for lines in heads) * LINE + 2 * MARGIN
    size = left + len(prompts) * (cell_w + MARGIN), top + sum(cell_h + MARGIN for _, cell_h in sizes.values())
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(heads):
        for number, line in enumerate(lines):
            place = left + column * (cell_w + MARGIN), top - MARGIN - (len(lines) - number) * LINE
            draw.text(place, line, "black", font=font)
    y = top
    for name, batch in images.items():
        draw.text((MARGIN, y + sizes[name][1] // 2 - LINE // 2), name, "black", font=font)
        for column, image in enumerate(batch[: len(prompts)]):
            tile = to_pil_image((image.clamp(0, 1) * 255).round().byte()).resize(sizes[name], resample)
            canvas.paste(tile, (left + column * (cell_w + MARGIN), y))
        y += sizes[name][1] + MARGIN
    return canvas


def _wrap(text: str, font, width: int) -> list[str]:
    """At most 4 lines of `text`, each no wider than `width` pixels as far as its words allow."""
    letters = max(8, int(width / font.getlength("n" * 10) * 10))
    return textwrap.wrap(text, letters, max_lines=4, placeholder=" ...") or [""]


def save_report(result: LadderResult, folder: str | Path) -> dict[str, Path]:
    """Write metrics.json, table.md and samples.png into `folder`; returns their paths by these names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in ("metrics.json", "table.md", "samples.png")}
    content = {"settings": result.settings, "rows": [asdict(row) for row in result.rows]}
    with replacing(paths["metrics.json"]) as path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with replacing(paths["table.md"]) as path:
        path.write_text(markdown_table(result.rows), encoding="utf-8")
    with replacing(paths["samples.png"]) as path:
        picture(result.images, result.prompts).save(path)
    return paths


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` at the end, removed on an error."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
