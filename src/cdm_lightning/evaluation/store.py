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

from cdm_lightning.ends.optional import may_fail
from cdm_lightning.evaluation.ladder import SamplerResult
from cdm_lightning.evaluation.pictures import to_picture
from cdm_lightning.files import replacing
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_measured(path: Path, key: str, prompts: Sequence[str]) -> SamplerResult | None:
    """Return the measurements in the file `path`, or None if they cannot be read or have another key.

    `prompts` are all prompts of the evaluation.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except (OSError, SafetensorError):
        return None  # there are none, or the disk failed while they were written: they are made again
    indices = tensors["indices"].tolist()
    collected = Collected([prompts[i] for i in indices], indices, has_noise=json.loads(header["has_noise"]))
    for full in sorted(tensors, key=_order):
        kind, _, name = full.partition(SEPARATOR)
        if kind in LISTS:
            name = name.rpartition(SEPARATOR)[0] if kind == "copies" else name
            getattr(collected, kind).setdefault(name, []).append(tensors[full])
    return SamplerResult(tensors["shown"], collected, float(header["seconds"]))


def _order(name: str) -> tuple[str, int]:
    """Sort the copies of an extractor by their number, so that 10 comes after 9."""
    head, _, last = name.rpartition(SEPARATOR)
    return (head, int(last)) if last.isdigit() else (name, 0)


class ImageFiles:
    """Writes the images of each sampler as PNG files into a subfolder of `folder`, with a manifest.jsonl.

    The manifest has one line for each image: the sampler's name ("model"), the prompt, the prompt's index, the seed of
    the noise, and the image's path inside `folder`. Other programs can read it to score the images. If a file cannot be
    written, a warning is printed.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], seed: int) -> None:
        self.folder, self.prompts, self.seed = folder, prompts, seed
        self._lines: dict[str, list[str]] = {}

    def add(self, sampler: str, images: Tensor, indices: Sequence[int]) -> None:
        """Write images (B, 3, H, W) in [0, 1] of the sampler `sampler`. `indices` are the indices of their prompts."""
        place = self.folder / file_name(sampler)
        for image, index in zip(images, indices, strict=True):
            path = place / f"{index:06d}.png"
            with may_fail(path):
                place.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    to_picture(image).save(temporary, format="PNG")
            entry = {"model": sampler, "prompt": self.prompts[index], "prompt_index": index, "seed": self.seed}
            line = json.dumps(entry | {"file": path.relative_to(self.folder).as_posix()}, ensure_ascii=False)
            self._lines.setdefault(sampler, []).append(line)

    def finish(self, sampler: str) -> None:
        """Write the manifest of the sampler named `sampler`. Call this after the last `add` for this sampler."""
        path = self.folder / file_name(sampler) / MANIFEST
        with may_fail(path), replacing(path) as temporary:
            temporary.write_text("\n".join(self._lines.pop(sampler, [])) + "\n", encoding="utf-8")
