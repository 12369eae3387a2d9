"""A cache on disk for the latents of real images. Each image is encoded only once, when it is first used.

    DIR/AB/ABCD....safetensors   the tensor "latent" (C, h, w) of one image, and its checksum

DIR is the folder of the cache. The file name ABCD... is a hash of the VAE, the dtype, and the image's size and pixels
(as 8-bit values). An image that was changed, or that has another size, is therefore encoded again. Several processes
and runs can share a folder.
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
from cdm_lightning.files import first_line, replacing, require_regular
from cdm_lightning.kinds import DtypeName, FolderToWrite

LATENT, CHECK = "latent", "crc32"


@dataclass(frozen=True)
class ImageCacheSettings:
    """The options `image_cache.*` of a run.

    `folder` is the folder of the cache; None means that there is no cache. `dtype` is the dtype in which latents are
    stored.
    """

    folder: FolderToWrite | None = None
    dtype: DtypeName = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"image_cache.dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")


class StoredLatents:
    """An encoder of images that keeps the latents in `folder`, so that each image is encoded only once.

    The parameter `encode` is the function that computes latents: `Backbone.encode_images`. `fingerprint` identifies the
    VAE that this function uses (see `caches.codec_of`). Images are encoded one at a time, so that a latent does not
    depend on the other images of a batch. If the file of a latent is damaged, the image is encoded again. If the folder
    cannot be written, for example because the disk is full, one warning is issued, and images whose latents are not
    stored are encoded each time that they are used.
    """

    def __init__(
        self, folder: str | Path, dtype: DtypeName, fingerprint: str, encode: Callable[[Tensor], Tensor]
    ) -> None:
        self.folder, self.dtype, self.fingerprint, self._encode = Path(folder), DTYPES[dtype], fingerprint, encode
        self._told = False

    def encode(self, images: Tensor) -> Tensor:
        """Return the clean latents of `images`: (B, C, h, w), float32, on the device of `images`.

        `images` are (B, 3, H, W) in [0, 1].
        """
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
        """Return the path of the file for the latent of the image with the 8-bit values `pixels` (3, H, W)."""
        about = f"{self.fingerprint} {self.dtype} {tuple(pixels.shape)} "
        name = hashlib.blake2b(about.encode() + pixels.numpy().tobytes(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, path: Path) -> Tensor | None:
        """Return a stored latent, or None if its file does not exist or is damaged."""
        try:
            with safe_open(require_regular(path), "pt") as file:
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
                warnings.warn(
                    f"image_cache.folder={self.folder} cannot be written ({why}); images are encoded each time",
                    stacklevel=2,
                )
            self._told = True


def _check_of(latent: Tensor) -> str:
    return str(zlib.crc32(latent.contiguous().view(torch.uint8).numpy().tobytes()))
