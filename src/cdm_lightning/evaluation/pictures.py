"""Draw overview pictures of generated images (P, 3, H, W) in [0, 1], with labels."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cdm_lightning.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and --help should not wait for it
    from PIL.Image import Image
    from torch import Tensor

CELL = (96, 256)  # smallest and largest side of an image in the picture, in pixels
MARGIN, LINE, FONT_SIZE = 6, 14, 12  # pixels
SMALLEST_TILE = 160  # pixels; smaller images of a grid are enlarged by an integer factor, without smoothing
MOST_COLUMNS = 6
MOST_PIXELS = 16_384  # on a side of a grid
GAP, LABEL_LINE, LABEL_LINES = 8, 16, 4  # of the grid: in pixels, in pixels, number of lines below each image
LABEL_SIZE, CHARACTER = 13, 7  # pixels: font size, and average width of a character


def picture(images: Mapping[str, "Tensor"], prompts: Sequence[str]) -> "Image":
    """Draw a picture with a row for each sampler and a column for each of P prompts.

    `images` maps the name of a sampler to its images (P, 3, H, W). The names are on the left, and the prompts are on
    top. Small images are enlarged by an integer factor without smoothing, and large ones are reduced. The factor is the
    same for all samplers, whose images may differ in size.
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
    """Wrap `text` into at most 4 lines of about `width` pixels each."""
    letters = max(8, int(width / font.getlength("n" * 10) * 10))
    return textwrap.wrap(text, letters, max_lines=4, placeholder=" ...") or [""]


def require_one_picture(count: int, size: tuple[int, int]) -> None:
    """Raise `UserError` if a grid of `count` images of `size` (height, width) would be too large for most programs to show."""
    grid = _grid_size(count, *size)
    if max(grid) > MOST_PIXELS:
        raise UserError(
            f"{count:,} images are too many for one picture ({grid[0]:,} x {grid[1]:,} pixels, but at most {MOST_PIXELS:,} on a side); "
            "pass --output FOLDER/ to write a file for each image"
        )


def _tile(height: int, width: int) -> tuple[int, int]:
    """Return the (width, height) of an image of this size in a grid."""
    scale = -(-SMALLEST_TILE // width)
    return width * scale, height * scale


def _grid_size(count: int, height: int, width: int) -> tuple[int, int]:
    """Return the (width, height) of a grid of `count` images of this size."""
    tile, columns = _tile(height, width), min(count, MOST_COLUMNS)
    rows = -(-count // columns)
    return (
        columns * (tile[0] + GAP) + GAP,
        rows * (tile[1] + LABEL_LINES * LABEL_LINE + GAP) + 2 * LABEL_LINE,
    )


def to_picture(image: "Tensor") -> "Image":
    """Return an image (3, H, W) in [0, 1] as a PIL image of the same size, rounded to 8 bits as diffusers does."""
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image((image * 255).round().byte())


def draw_grid(images: "Tensor", prompts: Sequence[str], title: str) -> "Image":
    """Draw images (N, 3, H, W) in [0, 1] in rows and columns, under a title. Each image has its prompt below it.

    Small images are enlarged by an integer factor without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = images.shape[2:]
    tile, columns = _tile(height, width), min(len(prompts), MOST_COLUMNS)
    cell = (tile[0] + GAP, tile[1] + LABEL_LINES * LABEL_LINE + GAP)
    grid = Image.new("RGB", _grid_size(len(prompts), height, width), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=LABEL_SIZE)
    draw.text((GAP, GAP), title, fill="black", font=font)
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        left, top = GAP + i % columns * cell[0], 2 * LABEL_LINE + i // columns * cell[1]
        grid.paste(to_picture(image).resize(tile, Image.Resampling.NEAREST), (left, top))
        words = textwrap.wrap(prompt, tile[0] // CHARACTER, max_lines=LABEL_LINES, placeholder=" ...")
        draw.multiline_text((left, top + tile[1]), "\n".join(words), fill="black", font=font, spacing=2)
    return grid
