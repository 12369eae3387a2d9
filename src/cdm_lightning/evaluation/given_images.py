"""A folder of images that were made elsewhere, to be measured like a model.

Each image belongs to one prompt. Which one it is, the file manifest.jsonl in the folder says, or the numbers that are
the files' names, or the order of the names. Shapes: images (B, 3, H, W) in [0, 1].
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cdm_lightning.data.images import as_tensor, opened
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.files import first_line, open_regular, read_text
from cdm_lightning.metrics.references import SUFFIXES
from cdm_lightning.metrics.suite import MetricSuite

MANIFEST = "manifest.jsonl"
MOST_MANIFEST = 1 << 30  # bytes
EXPECTED = (
    f"expected is one image for each prompt: with a {MANIFEST} of lines like "
    '{"file": "a.png", "prompt_index": 0}, with the prompts\' numbers from 0 as names, or with names in the order of the '
    "prompts"
)
CURE = "replace the file"
PARTS = re.compile(r"(\d+)")


class GivenImages(SamplerSpec):
    """The images of a folder as a sampler. It has no steps, no guidance and no shift."""

    def __str__(self) -> str:
        return f"GivenImages(name={self.name!r})"

    @property
    def is_made_here(self) -> bool:
        """False: the time and the network calls that the images took are not known."""
        return False

    @property
    def network_calls(self) -> int:
        """1, for the display of progress: reading takes no network calls."""
        return 1


def holds_images(folder: Path) -> bool:
    """Return whether `folder` holds images or a manifest. A pipeline folder or a run may also hold pictures."""
    return folder.is_dir() and ((folder / MANIFEST).is_file() or bool(_files(folder)) or bool(_parts(folder)))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]


def _parts(folder: Path) -> list[Path]:
    """Return the subfolders that have a manifest, as in the folder "images" that --save-images writes."""
    return sorted(path for path in folder.iterdir() if (path / MANIFEST).is_file())


@dataclass(frozen=True)
class ImagesOfPrompts:
    """The images in `folder`, as a model of an evaluation (see `grid.Opened`).

    `check` finds the image of each prompt. Raises `UserError` if it cannot, if an image cannot be read, and if two
    images differ in size.
    """

    folder: Path
    steps: None = None
    shares_noise: bool = False  # whether the noise is that of the known families; here it is not known
    notes: tuple[str, ...] = (
        "its images were made elsewhere, so differences to it are paired on prompts, not on noise",
    )

    def check(self, samplers: Sequence[SamplerSpec], prompts: Sequence[str], metrics: MetricSuite) -> None:
        """Find the image of each of N `prompts`, and read all images once.

        Raises `UserError` if there is not exactly one readable image of one size for each prompt, or if a metric needs
        several images of a prompt.
        """
        if metrics.copies.prompts:
            raise UserError(
                f"{self.folder} has one image of each prompt, but a metric needs {metrics.copies.images}, such as a metric of "
                "diversity; leave out this metric or these images"
            )
        found = self._by_manifest(prompts) if (self._place / MANIFEST).is_file() else self._by_name(len(prompts))
        sizes: dict[tuple[int, int], Path] = {}
        for path in found:
            with opened(path, CURE) as image:
                sizes.setdefault(image.size, path)
                if len(sizes) > 1:
                    (size, first), (other, second) = sizes.items()
                    raise UserError(
                        f"{self.folder} has images of different sizes: {first.name} of {size[0]} x {size[1]} and {second.name} of "
                        f"{other[0]} x {other[1]} pixels; make all of one size"
                    )
                image.verify() if image.format == "PNG" else image.load()  # verifying reads all, but decodes nothing
        self._known["paths"] = found

    def sizes(self, samplers: Sequence[SamplerSpec]) -> list[tuple[int, int]]:
        """Return the size (height, width) of the images in pixels. Call `check` first."""
        with opened(self._paths[0], CURE) as image:
            return [(image.height, image.width)]

    def digest(self) -> str:
        """Return a hash of the names and contents of the images. Call `check` first."""
        whole = hashlib.blake2b(digest_size=16)
        for path in self._paths:
            with open_regular(path) as file:
                whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, hashlib.blake2b).digest())
        return whole.hexdigest()

    def maker(self, device: torch.device, dtype: torch.dtype, batch_size: int) -> "ImagesOfPrompts":
        """Return this object. Nothing is loaded."""
        return self

    def images(self, spec: SamplerSpec, prompts: Sequence[str], indices: Sequence[int], seed: int) -> Tensor:
        """Read the images (B, 3, H, W) in [0, 1] of the prompts with these `indices`."""
        found = []
        for index in indices:
            with opened(self._paths[index], CURE) as image:
                found.append(as_tensor(image))
        return torch.stack(found)

    def take_counts(self) -> dict[str, float]:
        """Return {}: reading needs no network."""
        return {}

    @cached_property
    def _known(self) -> dict[str, list[Path]]:
        return {}

    @property
    def _paths(self) -> list[Path]:
        """The image of each prompt, as `check` has found them."""
        return self._known["paths"]

    @cached_property
    def _place(self) -> Path:
        """The folder with the images: `folder`, or its only subfolder with a manifest."""
        parts = [] if (self.folder / MANIFEST).is_file() or _files(self.folder) else _parts(self.folder)
        if len(parts) > 1:
            raise UserError(
                f"{self.folder} has the images of {len(parts)} samplers; pass one --model for each folder in it, such as "
                f"{parts[0]}"
            )
        return parts[0] if parts else self.folder

    def _by_name(self, count: int) -> list[Path]:
        """Return the images in the order of the numbers that are their names, or in the order of their names."""
        files = sorted(_files(self._place), key=lambda path: path.name)
        if len(files) != count:
            raise UserError(f"{self.folder} has {len(files)} images for {count} prompts; {EXPECTED}")
        if all(path.stem.isascii() and path.stem.isdigit() for path in files):
            numbered = {int(path.stem): path for path in files}
            if missing := [number for number in range(count) if number not in numbered]:
                raise UserError(f"{self.folder} has no image with the number {missing[0]} as its name; {EXPECTED}")
            return [numbered[number] for number in range(count)]
        if sorted(files, key=_by_number) != files:
            raise UserError(
                f"{self.folder}: the order of the names is not certain, because 10 comes before 2 in it; write the numbers with "
                f"leading zeros, or a {MANIFEST}"
            )
        return files

    def _by_manifest(self, prompts: Sequence[str]) -> list[Path]:
        """Return the images in the order of the prompts' indices in the manifest."""
        file, found = self._place / MANIFEST, dict[int, Path]()
        try:
            lines = read_text(file, MOST_MANIFEST).split("\n")  # a prompt may have other ends of lines
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)}); {EXPECTED}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            index, path, prompt = self._entry(line, where)
            if index in found:
                raise UserError(f"{where}: prompt {index} has an image already; {EXPECTED}")
            if index >= len(prompts):
                raise UserError(f"{where}: there is no prompt {index}, but only {len(prompts)} prompts; {EXPECTED}")
            if prompt is not None and prompt != prompts[index]:
                raise UserError(
                    f"{where}: the image was made for {prompt[:60]!r}, but prompt {index} is {prompts[index][:60]!r}; pass the "
                    "--prompts that the images were made for"
                )
            found[index] = path
        if missing := [index for index in range(len(prompts)) if index not in found]:
            raise UserError(
                f"{file} has {len(found)} images for {len(prompts)} prompts, none for {missing[0]}; {EXPECTED}"
            )
        return [found[index] for index in range(len(prompts))]

    def _entry(self, line: str, where: str) -> tuple[int, Path, str | None]:
        """Return the prompt's index, the image and the prompt (or None) of a line of the manifest."""
        try:
            entry = json.loads(line)
            index, name, prompt = entry["prompt_index"], entry["file"], entry.get("prompt")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{where}: it has no prompt_index and file; {EXPECTED}") from error
        is_index = isinstance(index, int) and not isinstance(index, bool) and index >= 0
        if not is_index or not isinstance(name, str) or not isinstance(prompt, str | None) or "\0" in name:
            raise UserError(f"{where}: prompt_index must be a number from 0, and file and prompt texts; {EXPECTED}")
        parts = Path(name).parts
        path = self._place / name
        if (
            len(parts) == 2 and not path.is_file()
        ):  # --save-images writes the name of the folder, which may be another now
            path = self._place / parts[1]
        if Path(name).is_absolute() or ".." in parts or not path.is_file():
            raise UserError(f"{where}: the image {name[:200]!r} is not in the folder; {EXPECTED}")
        return index, path, prompt


def _by_number(path: Path) -> list[str | int]:
    """Sort names with numbers in them by the numbers, so that 10 comes after 9."""
    return [int(part) if part.isascii() and part.isdigit() else part for part in PARTS.split(path.name)]
