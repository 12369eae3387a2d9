"""Real images to compare with: iterables of batches (B, 3, H, W) in [0, 1] that can be gone through again and again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cdm_lightning.core.rng import stream
from cdm_lightning.data.shapes import Split, draw_scenes, parse_caption, render
from cdm_lightning.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CHUNK = 256  # renderings at a time


@dataclass(frozen=True)
class ShapesRenderings:
    """`count` renderings of the shapes set, a function of (split, seed)."""

    count: int = 4096
    split: Split = "heldout"
    seed: int = 0

    def __iter__(self) -> Iterator[Tensor]:
        scenes = draw_scenes(self.count, self.seed, self.split)
        for start in range(0, self.count, CHUNK):
            yield render(scenes[start : start + CHUNK], stream(self.seed, "reference", start).initial_seed())


def render_prompts(prompts: Sequence[str], indices: Sequence[int], seed: int) -> Tensor:
    """A rendering (B, 3, 32, 32) of each caption, a function of (caption, index, seed); ValueError for another text."""
    seeds = [stream(seed, "rendering of a prompt", index).initial_seed() for index in indices]
    return torch.cat([render([parse_caption(prompt)], its) for prompt, its in zip(prompts, seeds, strict=True)])


class ImageFolder:
    """The images under a folder, in the order of their paths, as batches.

    With `image_size` (side in pixels) each is resized to cover a square of that side and cropped to its middle;
    without, all must be of one size. Raises `UserError` for no images, unreadable ones or differing sizes.
    """

    def __init__(self, folder: str | Path, image_size: int | None = None, batch_size: int = 64) -> None:
        self.folder, self.image_size, self.batch_size = Path(folder), image_size, batch_size
        self.paths = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise UserError(f"{folder} holds no reference images ({', '.join(SUFFIXES)}); give a folder that does")

    def __iter__(self) -> Iterator[Tensor]:
        size = self.image_size and (3, self.image_size, self.image_size)
        for start in range(0, len(self.paths), self.batch_size):
            batch = []
            for path in self.paths[start : start + self.batch_size]:
                batch.append(self._read(path))
                size = size or batch[-1].shape
                if batch[-1].shape != size:
                    raise UserError(f"{path}: reference images differ in size; set image_size to bring them to one")
            yield torch.stack(batch)

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps
        from torchvision.transforms.functional import pil_to_tensor

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise UserError(f"{path}: cannot be read as an image ({error}); remove it") from error
        if self.image_size:
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return pil_to_tensor(image).float() / 255
