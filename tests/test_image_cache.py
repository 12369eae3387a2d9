"""Latents of real images on disk: each image is encoded once, whatever its batch, and damage and full disks are survived."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cdm_lightning.config import compose
from cdm_lightning.data.image_cache import ImageCacheSettings, StoredLatents
from cdm_lightning.errors import UserError
from cdm_lightning.train import train

IMAGES = torch.randint(0, 256, (4, 3, 6, 6), generator=torch.Generator().manual_seed(0)).float() / 255


class Codec:
    """An encoder that counts its images."""

    def __init__(self) -> None:
        self.encoded = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return images[:, :2, ::3, ::3] * 2 - 1.2345678


def stored(folder: Path, codec: Codec, dtype: str = "float32", fingerprint: str = "codec") -> StoredLatents:
    return StoredLatents(folder, dtype, fingerprint, codec)


def test_each_image_is_encoded_once_and_comes_back_exactly(tmp_path) -> None:
    codec = Codec()
    first = stored(tmp_path, codec).encode(IMAGES)
    assert torch.equal(first, Codec()(IMAGES))
    assert torch.equal(stored(tmp_path, codec).encode(IMAGES.flip(0)), first.flip(0))
    assert codec.encoded == 4
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_other_pixels_sizes_and_codecs_have_latents_of_their_own(tmp_path) -> None:
    codec = Codec()
    stored(tmp_path, codec).encode(IMAGES[:1])
    changed = IMAGES[:1].clone()
    changed[0, 2, 1, 1] = (changed[0, 2, 1, 1] + 0.5) % 1
    for images, fingerprint in ((changed, "codec"), (IMAGES[:1, :, :, :3], "codec"), (IMAGES[:1], "other")):
        before = codec.encoded
        stored(tmp_path, codec, fingerprint=fingerprint).encode(images)
        assert codec.encoded == before + 1


def test_a_latent_is_rounded_to_the_dtype_of_the_files_from_the_first_time_on(tmp_path) -> None:
    cache = stored(tmp_path, Codec(), "bfloat16")
    first = cache.encode(IMAGES)
    assert first.dtype == torch.float32
    assert torch.equal(first, Codec()(IMAGES).bfloat16().float())
    assert torch.equal(cache.encode(IMAGES), first)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_written_again(tmp_path, damage) -> None:
    codec = Codec()
    cache = stored(tmp_path, codec)
    first = cache.encode(IMAGES[:1])
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-5])
    for encoded in (2, 2):  # once again, and not a third time
        assert torch.equal(cache.encode(IMAGES[:1]), first)
        assert codec.encoded == encoded


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = stored(tmp_path / "file", Codec())
    with pytest.warns(UserWarning, match="cannot be written") as told:
        latents = cache.encode(IMAGES)
    assert torch.equal(latents, Codec()(IMAGES))
    assert len(told) == 1


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UserError, match=r"image_cache\.dtype"):
        ImageCacheSettings(dtype="int8")


def test_a_run_with_the_cache_is_one_without_it(tmp_path) -> None:
    common = ["experiment=toy2d_cdm", "objective=scm", "objective.start=data", "backbone.hidden=8", "backbone.depth=1"]
    common += ["backbone.fit_steps=2", "data.train._target_=benchmarks.dots.PicturedPoints", "data.train.repeat=8"]
    common += ["trainer.max_steps=4", "data.batch_size=4", "callbacks=none", "metric=[]", "trainer.limit_val_batches=0"]
    common += ["trainer.log_every_n_steps=1"]
    runs = {"without": [], "first": [f"image_cache.folder={tmp_path}/kept"]}
    runs["second"] = runs["first"]
    figures = {
        name: train(compose([*common, *more, f"output_dir={tmp_path}/{name}"])).metrics for name, more in runs.items()
    }
    assert figures["first"] == figures["second"]
    assert figures["first"] == pytest.approx(figures["without"], rel=1e-5)  # of the points, in batches of another size
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 8
