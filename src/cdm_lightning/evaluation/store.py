"""Write the images of an evaluation, and its measurements, from which a stopped evaluation continues.

The measurements of each sampler (a way to make images) are a safetensors file with features and scores. The file's
header contains a key, a hash of everything that determines the measurements. A file with another key is ignored and
replaced.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdm_lightning.evaluation.ladder import SamplerResult
from cdm_lightning.evaluation.pictures import to_picture
from cdm_lightning.evaluation.thumbnails import require_readable
from cdm_lightning.files import replacing, require_regular, write_text
from cdm_lightning.metrics.suite import Collected

SEPARATOR = "/"  # between the parts of a tensor's name
LISTS = ("features", "scores", "copies", "other_noise")  # of `Collected`
MANIFEST = "manifest.jsonl"


def key_of(settings: Mapping[str, Any]) -> str:
    """Return a hash of `settings`, which must hold everything that determines a sampler's measurements."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def file_name(text: str) -> str:
    """Return a file name for the sampler with the name `text`: the name's letters and digits, and a hash of the name.

    Without the hash, two samplers with similar names could have the same file.
    """
    plain = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in text)[:80]
    return f"{plain}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def own_file(path: Path) -> Path:
    """Return `path`, a file in a folder that the evaluation itself has made, ready to be written: it is no link.

    A link would be followed, and the file of somebody else replaced. The file's folder is created if it does not exist.
    Raises OSError if the disk fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    return path


def save_measured(path: Path, result: SamplerResult, key: str) -> None:
    """Write the measurements of a sampler with their `key` (see `key_of`), completely or not at all.

    Raises OSError if the disk fails.
    """
    collected = result.collected
    tensors = {"shown": result.shown.contiguous(), "indices": torch.tensor(collected.indices)}
    for kind in LISTS:
        for name, parts in getattr(collected, kind).items():
            if kind == "copies":  # one tensor for each additional image of the prompts
                tensors |= {f"{kind}{SEPARATOR}{name}{SEPARATOR}{i}": part.contiguous() for i, part in enumerate(parts)}
            else:
                tensors[f"{kind}{SEPARATOR}{name}"] = torch.cat(parts).contiguous()
    header = {"key": key, "seconds": repr(result.seconds), "has_noise": json.dumps(collected.has_noise)}
    header["counts"] = json.dumps(result.counts)
    if result.thumbnails:
        tensors["thumbnails"] = torch.frombuffer(bytearray(b"".join(result.thumbnails)), dtype=torch.uint8)
        tensors["thumbnail_sizes"] = torch.tensor([len(content) for content in result.thumbnails])
    with replacing(own_file(path)) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_measured(path: Path, key: str, prompts: Sequence[str], features: Sequence[str] = ()) -> SamplerResult | None:
    """Return the measurements in the file `path`, or None if they cannot be read or have another key.

    `prompts` are all prompts of the evaluation, and `features` the names of the extractors whose features must be there.
    """
    try:
        with safe_open(require_regular(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        found = _result_of(tensors, header, prompts)
        return found if set(features) <= set(found.collected.features) else None
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None  # there are none, or they are damaged: they are made again


def _result_of(tensors: Mapping[str, Tensor], header: Mapping[str, str], prompts: Sequence[str]) -> SamplerResult:
    """Return the measurements that a file holds. Raises LookupError, TypeError or ValueError if it is not complete."""
    indices = tensors["indices"].tolist()
    if indices != list(range(len(prompts))):
        raise ValueError("there must be one image for each prompt")
    collected = Collected([prompts[i] for i in indices], indices, has_noise=json.loads(header["has_noise"]))
    for full in sorted(tensors, key=_order):
        kind, _, name = full.partition(SEPARATOR)
        if kind in LISTS:
            name = name.rpartition(SEPARATOR)[0] if kind == "copies" else name
            getattr(collected, kind).setdefault(name, []).append(tensors[full])
            if kind != "copies" and len(tensors[full]) != len(indices):
                raise ValueError(f"{full} must have a row for each prompt")
    counts = {str(name): float(count) for name, count in json.loads(header.get("counts", "{}")).items()}
    return SamplerResult(
        tensors["shown"], collected, float(header["seconds"]), counts, _thumbnails(tensors, len(indices))
    )


def _thumbnails(tensors: Mapping[str, Tensor], prompts: int) -> list[bytes]:
    """Return the small images in a file, or [] if an older version has written it. Raises ValueError or OSError if damaged."""
    if "thumbnails" not in tensors:
        return []
    whole, sizes = tensors["thumbnails"].numpy().tobytes(), tensors["thumbnail_sizes"].tolist()
    if len(sizes) > prompts or min(sizes, default=1) < 1 or sum(sizes) != len(whole):
        raise ValueError("the sizes of the small images do not fit")
    found, start = [], 0
    for size in sizes:
        found.append(whole[start : start + size])
        start += size
        require_readable(found[-1])
    return found


def _order(name: str) -> tuple[str, int]:
    """Sort the copies of an extractor by their number, so that 10 comes after 9."""
    head, _, last = name.rpartition(SEPARATOR)
    return (head, int(last)) if last.isdigit() else (name, 0)


class ImageFiles:
    """Writes the images of each sampler as PNG files into a subfolder of `folder`, with a manifest.jsonl.

    The manifest has one line for each image: the sampler's name ("model"), the prompt, the prompt's index, the seed of
    the noise, a mark of the sampler's images ("images"), and the image's path inside `folder`. Other programs can read it
    to score the images. The methods raise
    OSError if a file cannot be written.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], seed: int) -> None:
        self.folder, self.prompts, self.seed = folder, prompts, seed

    def add(self, sampler: str, images: Tensor, indices: Sequence[int]) -> None:
        """Write images (B, 3, H, W) in [0, 1] of the sampler `sampler`. `indices` are the indices of their prompts."""
        for image, index in zip(images, indices, strict=True):
            with replacing(own_file(self.folder / self._file(sampler, index))) as temporary:
                to_picture(image).save(temporary, format="PNG")

    def finish(self, sampler: str, mark: str) -> None:
        """Write the manifest of the sampler named `sampler`. Call this after the last `add` of all processes.

        `mark` is a hash of everything that determines its images, from which later scores of them are recognized.
        Images of an earlier evaluation of more prompts are deleted.
        """
        place = self.folder / file_name(sampler)
        for path in place.glob(f"{'[0-9]' * 6}.png"):
            if int(path.stem) >= len(self.prompts):
                path.unlink()
        lines = []
        for index, prompt in enumerate(self.prompts):
            entry = {"model": sampler, "prompt": prompt, "prompt_index": index, "seed": self.seed, "images": mark}
            lines.append(json.dumps(entry | {"file": self._file(sampler, index)}, ensure_ascii=False) + "\n")
        write_text(own_file(place / MANIFEST), "".join(lines))

    def _file(self, sampler: str, index: int) -> str:
        return f"{file_name(sampler)}/{index:06d}.png"

    def is_complete(self, sampler: str) -> bool:
        """Return whether the folder has the manifest of the sampler named `sampler` and an image for each prompt."""
        place = self.folder / file_name(sampler)
        return (place / MANIFEST).is_file() and all(
            (place / f"{index:06d}.png").is_file() for index in range(len(self.prompts))
        )
