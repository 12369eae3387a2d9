"""Latents of real images, kept on the disk: each image is encoded once, the first time that it is used.

    DIR/AB/ABCD....safetensors   "latent" (C, h, w), with its check sum; the name is a hash of the image codec and of the pixels

The pixels decide, at 8 bits as in image files, so an image that was changed is encoded again, and one at another size too. Several
processes and runs may share a folder.
"""

import hashlib
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdm_lightning.data.text_shards import DTYPES
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, replacing
from cdm_lightning.kinds import DtypeName, FolderToWrite

LATENT, CHECK = "latent", "crc32"


@dataclass(frozen=True)
class ImageCacheSettings:
    """The options `image_cache.*`: the folder in which latents of real images are kept (None: nowhere), and their dtype there."""

    folder: FolderToWrite | None = None
    dtype: DtypeName = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"image_cache.dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")


class StoredLatents:
    """Encodes images into latents, and keeps the latents in `folder`.

    `encode` is `Backbone.encode_images`, and `fingerprint` identifies the image codec. Images are encoded one by one, so that a
    latent does not depend on the batch. A file that is damaged is written again. A folder that cannot be written, because the disk
    is full for example, costs one warning and the time of encoding.
    """

    def __init__(
        self, folder: str | Path, dtype: DtypeName, fingerprint: str, encode: Callable[[Tensor], Tensor]
    ) -> None:
        self.folder, self.dtype, self.fingerprint, self._encode = Path(folder), DTYPES[dtype], fingerprint, encode
        self._told = False

    def encode(self, images: Tensor) -> Tensor:
        """Return the clean latents (B, C, h, w), float32, of images (B, 3, H, W) in [0, 1], on the images' device."""
        pixels = (images.detach().float() * 255).round().to(torch.uint8).cpu()
        rows = [self._row(image, eight_bit) for image, eight_bit in zip(images, pixels)]
        return torch.stack(rows).to(images.device, torch.float32)

    def _row(self, image: Tensor, pixels: Tensor) -> Tensor:
        path = self.path_of(pixels)
        latent = self._read(path)
        if latent is None:
            latent = self._encode(image[None])[0].to("cpu", self.dtype).contiguous()
            self._write(path, latent)
        return latent

    def path_of(self, pixels: Tensor) -> Path:
        """Return the file of an image, by its 8-bit pixels (3, H, W)."""
        about = f"{self.fingerprint} {self.dtype} {tuple(pixels.shape)} "
        name = hashlib.blake2b(about.encode() + pixels.numpy().tobytes(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, path: Path) -> Tensor | None:
        """Return a stored latent; None if there is none, or if its file is damaged."""
        try:
            with safe_open(path, "pt") as file:
                latent, check = file.get_tensor(LATENT), (file.metadata() or {}).get(CHECK)
        except (OSError, SafetensorError):
            return None
        return latent if check == _check_of(latent) else None

    def _write(self, path: Path, latent: Tensor) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file({LATENT: latent}, temporary, {CHECK: _check_of(latent)})
        except (OSError, SafetensorError) as error:
            if not self._told:
                why = first_line(error)
                warnings.warn(f"image_cache.folder={self.folder}: latents cannot be kept ({why})", stacklevel=2)
            self._told = True


def _check_of(latent: Tensor) -> str:
    return str(zlib.crc32(latent.contiguous().view(torch.uint8).numpy().tobytes()))
