"""Small copies of an evaluation's first images, as files in memory, for the page report.html.

A sampler's images are kept at most `SIDE` pixels wide and high, and compressed: a megabyte for `MOST` images. The page
takes them as they are, or smaller, so that all of them fit into a number of bytes. Shapes: images (3, H, W) in [0, 1].
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdm_lightning.evaluation.pictures import to_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MOST = 64  # prompts whose images are kept
SIDE = 256  # pixels; the longer side of what is kept
LOSSLESS = 96  # pixels; in smaller images, every pixel can be seen
SAMPLE = 24  # images from which the size of all is estimated
QUALITIES = (
    (256, 85),
    (256, 70),
    (192, 75),
    (192, 60),
    (160, 60),
    (128, 70),
    (128, 50),
    (96, 50),
    (64, 60),
    (64, 35),
    (32, 30),
)
FORMATS = ("WEBP", "JPEG", "PNG")  # all that is read back


def thumbnail(image: "Tensor") -> bytes:
    """Return an image as the content of a file whose longer side has at most `SIDE` pixels: WebP, without loss if small."""
    return _encoded(_reduced(to_picture(image.clamp(0, 1)), SIDE), quality=95)


def require_readable(content: bytes) -> None:
    """Raise OSError or ValueError if `content` is not what `thumbnail` returns, such as a damaged or a huge image."""
    opened(content).load()


def opened(content: bytes) -> "Image":
    """Return the image in `content`, which `thumbnail` has made. Raises OSError or ValueError if it is another or too large."""
    from PIL import Image

    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if max(image.size) > SIDE:
        raise ValueError(f"the image has {image.width} x {image.height} pixels, more than {SIDE}")
    return image


@dataclass(frozen=True)
class Fitted:
    """Images as `data:` addresses, in the order in which they were given, and the longer side to which they were reduced.

    `side` is None if they are as they were kept.
    """

    addresses: list[str]
    side: int | None


def fit(contents: Sequence[bytes], most: int) -> Fitted | None:
    """Return images as addresses of at most `most` characters together, in the best quality that fits, or None if none does.

    `contents` are files that `thumbnail` has made.
    """
    whole = [_address(content) for content in contents]
    if sum(map(len, whole)) <= most:
        return Fitted(whole, None)
    different = list(dict.fromkeys(contents))
    some = different[:: max(1, len(different) // SAMPLE)]
    for side, quality in QUALITIES:
        estimate = sum(len(_address(_smaller(content, side, quality))) for content in some)
        if estimate / len(some) * len(contents) > most:
            continue
        smaller = {content: _address(_smaller(content, side, quality)) for content in different}
        found = [smaller[content] for content in contents]
        if sum(map(len, found)) <= most:
            return Fitted(found, side)
    return None


def _smaller(content: bytes, side: int, quality: int) -> bytes:
    """Return an image with at most `side` pixels on its longer side, or as it is if that takes fewer bytes."""
    return min(content, _encoded(_reduced(opened(content).convert("RGB"), side), quality, may_lose=True), key=len)


def _reduced(image: "Image", side: int) -> "Image":
    from PIL import Image

    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _encoded(image: "Image", quality: int, may_lose: bool = False) -> bytes:
    """Return the content of a WebP file, or of PNG and JPEG if this Pillow was built without WebP."""
    from PIL import features

    content, is_exact = io.BytesIO(), max(image.size) <= LOSSLESS and not may_lose
    if features.check("webp"):
        image.save(content, format="WEBP", lossless=is_exact, quality=quality)
    elif is_exact:
        image.save(content, format="PNG", optimize=True)
    else:
        image.save(content, format="JPEG", quality=quality)
    return content.getvalue()


def _address(content: bytes) -> str:
    kind = "webp" if content[:4] == b"RIFF" else "png" if content[:4] == b"\x89PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
