"""Sets of prompts with real images, for objectives that learn from images. Images are (B, 3, H, W) in [0, 1]."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch.nn.functional as F
from annotated_types import Len
from torch import Tensor

from cdm_lightning.core.rng import stream
from cdm_lightning.data.lines import LineFiles
from cdm_lightning.data.prompts import PromptFile, Prompts
from cdm_lightning.data.selection import flaw_of, is_visible
from cdm_lightning.data.shapes import parse_caption, render
from cdm_lightning.errors import UserError
from cdm_lightning.files import require_regular
from cdm_lightning.kinds import FileOrFolder, FolderToRead, Pixels, Seed

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA = "metadata.jsonl"
MOST_IMAGE = 1 << 30  # bytes


class CaptionedFolder(Prompts):
    """The images in a folder, with their captions as prompts. The file `metadata.jsonl` in the folder lists the images.

    Each line of `metadata.jsonl` is {"file_name": ..., "text": ...}, the ImageFolder format of Hugging Face `datasets`.
    An image is rotated as its EXIF data says, resized to cover `image_size` (height, width) in pixels, and cropped to
    its middle.

    Raises `UserError` if `metadata.jsonl` is missing, lists no images, has a line of another form or names a missing
    image, and if `image_size` is not two positive numbers. An image that cannot be read raises `UserError` later, when
    it is used.
    """

    has_images = True

    def __init__(self, folder: FolderToRead, image_size: Annotated[Sequence[Pixels], Len(2, 2)]) -> None:
        self.folder, self.image_size = Path(folder), tuple(image_size)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise UserError(
                f"{folder}: image_size={list(self.image_size)} must be [height,width] in pixels, both at least 1"
            )
        listed = self.folder / METADATA
        if not listed.is_file():
            raise UserError(
                f"{folder} has no {METADATA}; write this file, with file_name and text of one image on each line"
            )
        lines = enumerate((text for _, text in LineFiles([listed], whole=True).scan()), start=1)
        self._entries = [self._entry(line, number) for number, line in lines if line]
        if not self._entries:
            raise UserError(f"{listed} lists no images; write a line with file_name and text for each image")

    def _entry(self, line: str, number: int) -> tuple[Path, str]:
        where = f"{self.folder / METADATA}, line {number}"
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{where}: the line must be {{"file_name": "IMAGE", "text": "CAPTION"}}') from error
        if not isinstance(name, str) or not isinstance(text, str) or not is_visible(text):
            raise UserError(
                f"{where}: {'text is blank; fill it in' if type(name) is type(text) is str else 'file_name and text must be strings'}"
            )
        if flaw := flaw_of(text) or flaw_of(name):
            raise UserError(f"{where}: {flaw}")
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{where}: the file {path} does not exist; correct file_name or remove the line")
        return path, text.strip()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> str:
        """Return the caption of image number `index`."""
        return self._entries[index][1]

    def image(self, index: int) -> Tensor:
        """Return image number `index`, (3, H, W) in [0, 1], where (H, W) is `image_size`.

        Raises `UserError` if the image cannot be read.
        """
        from PIL import ImageOps

        path = self._entries[index][0]
        with opened(path, f"replace it or remove its line from {METADATA}") as file:
            upright = ImageOps.exif_transpose(file)  # cameras do not turn the pixels; they store how to turn them
            pixels = as_tensor(upright)
        return fit_to(pixels[None], self.image_size)[0]


@contextmanager
def opened(path: Path, cure: str) -> "Generator[Image]":
    """Yield the image in the file `path`, whose pixels are read later.

    Raises `UserError` if the file is no image, damaged or too large, also while the `with` block reads the pixels. The
    message says that it cannot be read, and how to fix it (`cure`).
    """
    from PIL import Image

    try:
        with Image.open(require_regular(path, MOST_IMAGE)) as file:
            yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a damaged file raises these
        why = str(error).partition(str(path))[0].removesuffix(" '") or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({why}); {cure}") from error


def as_tensor(image: "Image") -> Tensor:
    """Return an image as (3, H, W) in [0, 1] (see `as_rgb`). Raises ValueError for 32-bit values."""
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(as_rgb(image)).float() / 255


def as_rgb(image: "Image") -> "Image":
    """Return an image as 8-bit RGB. Grey values of 16 bits are scaled, and transparent pixels are shown on white.

    Pillow's own conversion would clip 16-bit values at 255 and show the arbitrary colours under transparent pixels.
    Raises ValueError for 32-bit values, because their range is unknown.
    """
    import numpy as np
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(float)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have 32 bits; convert it to 8 or 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")


class DrawnCaptions(PromptFile):
    """Captions of the bundled shapes set (`data/shapes.py`) in a file, with an image that is rendered for each caption.

    The image is a function of the caption, of the caption's number in the file, and of `seed`.
    """

    has_images = True

    def __init__(self, path: FileOrFolder, seed: Seed = 0) -> None:
        super().__init__(path)
        self.seed = seed

    def image(self, index: int) -> Tensor:
        """Render the image of caption number `index`, (3, 32, 32) in [0, 1].

        Raises `UserError` if the prompt with this number is not a caption of the shapes set.
        """
        try:
            scene = parse_caption(self[index])
        except ValueError as error:
            raise UserError(f"{self.name}: {error}; use only captions of the bundled shapes set") from None
        return render([scene], stream(self.seed, "image of a caption", index).initial_seed())[0]


def fit_to(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize images (B, 3, H, W) in [0, 1] to cover `size` (height, width) and crop the middle: (B, 3, height, width).

    Images that already have this size are returned unchanged.
    """
    height, width = size
    if images.shape[-2:] == (height, width):
        return images
    scale = max(height / images.shape[-2], width / images.shape[-1])
    covering = [max(round(side * scale), least) for side, least in zip(images.shape[-2:], (height, width))]
    resized = F.interpolate(images, size=covering, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return resized[..., top : top + height, left : left + width]
