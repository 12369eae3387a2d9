"""Real images with which metrics compare generated images, as iterables of batches (B, 3, H, W) in [0, 1].

`ImageFolder` reads the images from a folder, and `ShapesRenderings` renders images of the shapes set. The shapes set is
this package's procedural data set of captioned shapes (see `data.shapes`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from cdm_lightning.core.rng import stream
from cdm_lightning.data.images import as_rgb
from cdm_lightning.data.shapes import Scene, parse_caption, render
from cdm_lightning.errors import UserError
from cdm_lightning.files import require_regular
from cdm_lightning.kinds import BatchSize, Count, FolderToRead, Index, Pixels, Seed, Several

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CHUNK = 256  # renderings per batch
MOST_IMAGE = 1 << 30  # bytes


@dataclass(frozen=True)
class ShapesRenderings:
    """Real images for a metric: `count` images of the shapes set, in batches (B, 3, 32, 32) in [0, 1].

    Each image shows one of the first `captions` entries of `prompts` (None: of all entries). The images follow the
    order of the prompts, and start again with the first prompt after the last one. They depend only on these prompts
    and on `seed`. Pass the prompts of the generated images as `prompts`, as is usual for FID on COCO. If the real
    images showed other prompts, even a perfect generator would have a distance above 0 to them.

    Raises `UserError` if there are fewer prompts than `captions`, or if one of these prompts is not a caption of the
    shapes set.
    """

    prompts: Sequence[str]
    captions: Count | None = None  # None: all prompts
    count: Several = 4096
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.captions is not None and not 1 <= self.captions <= len(self.prompts):
            raise UserError(
                f"the reference of a metric: captions={self.captions} must be from 1 to {len(self.prompts)} (there are "
                f"{len(self.prompts)} prompts), or null for all of them"
            )
        for number in range(self.captions or len(self.prompts)):
            _ = scene_of(self.prompts[number])  # wrong prompts are refused now, and not only when the images are needed

    def __iter__(self) -> Iterator[Tensor]:
        captions = self.captions or len(self.prompts)
        for start in range(0, self.count, CHUNK):
            indices = range(start, min(start + CHUNK, self.count))
            scenes = [scene_of(self.prompts[index % captions]) for index in indices]
            yield render(scenes, stream(self.seed, "reference", start).initial_seed())


def render_prompts(prompts: Sequence[str], indices: Sequence[Index], seed: Seed) -> Tensor:
    """Return a rendering of each of B prompts, (B, 3, 32, 32) in [0, 1].

    A rendering depends only on its prompt, on the prompt's number in `indices`, and on `seed`. Raises `UserError` for a
    prompt that is not a caption of the shapes set.
    """
    seeds = [stream(seed, "rendering of a prompt", index).initial_seed() for index in indices]
    return torch.cat([render([scene_of(prompt)], its) for prompt, its in zip(prompts, seeds, strict=True)])


def scene_of(prompt: str) -> Scene:
    """Return the scene that `prompt`, a caption of the shapes set, describes. Raises `UserError` for any other text."""
    try:
        return parse_caption(prompt)
    except ValueError as error:
        raise UserError(
            f"real images cannot be rendered for this prompt: {error}; use captions of the bundled shapes set as prompts"
        ) from None


class ImageFolder:
    """The images in a folder and its subfolders, in the order of their paths, in batches (B, 3, H, W) in [0, 1].

    B is `batch_size`, or less in the last batch. If `image_size` (in pixels) is given, the largest square in the middle
    of each image is cut out and resized to this side. Otherwise all images must have the same size.

    Raises `UserError` for a folder without images, for an unreadable image, and, without `image_size`, for images of
    different sizes.
    """

    def __init__(self, folder: FolderToRead, image_size: Pixels | None = None, batch_size: BatchSize = 64) -> None:
        self.folder, self.image_size, self.batch_size = Path(folder), image_size, batch_size
        self.paths = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise UserError(
                f"{folder} has no reference images (files named {', '.join(SUFFIXES)}); pass another folder"
            )
        sizes = {self._size(path): path for path in self.paths}  # reads headers only
        if len(sizes) > 1 and image_size is None:
            self._refuse_sizes(list(sizes.values())[1])

    def __iter__(self) -> Iterator[Tensor]:
        size = self.image_size and (3, self.image_size, self.image_size)
        for start in range(0, len(self.paths), self.batch_size):
            batch = []
            for path in self.paths[start : start + self.batch_size]:
                batch.append(self._read(path))
                size = size or batch[-1].shape
                if batch[-1].shape != size:
                    self._refuse_sizes(path)
            yield torch.stack(batch)

    def _size(self, path: Path) -> tuple[int, int]:
        """Return the width and height of an image from its header. Raises `UserError` if it is not an image."""
        from PIL import Image

        try:
            with Image.open(require_regular(path, MOST_IMAGE)) as file:
                return file.size
        except (OSError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be read as an image ({error}); remove it") from error

    def _refuse_sizes(self, path: Path) -> NoReturn:
        raise UserError(
            f"{path}: its size differs from that of the reference image {self.paths[0]}; set image_size "
            "to resize all to one size"
        )

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps
        from torchvision.transforms.functional import pil_to_tensor

        try:
            with Image.open(require_regular(path, MOST_IMAGE)) as file:
                image = as_rgb(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be read as an image ({error}); remove it") from error
        if self.image_size:
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return pil_to_tensor(image).float() / 255
