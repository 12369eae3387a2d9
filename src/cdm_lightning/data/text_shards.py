"""The files of a text cache: the encoded prompts that the command `cache_text` writes and training reads.

    DIR/text_cache.json            the manifest: the fingerprint of the text encoders (hashes and settings), the stored dtype,
                                   and the shape and dtype of each tensor
    DIR/shards/HASH.safetensors    a shard of a few hundred megabytes, for n prompts: "keys" (n, 16) uint8, "crc32" (n,) int64,
                                   and the encodings "cond.NAME" (n, ...); HASH is a hash of the keys

The key of a prompt is a hash of its text. Each file is written under a temporary name and renamed when it is complete.
Each prompt has a checksum, so that damage is noticed when the prompt is used.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdm_lightning.errors import UserError
from cdm_lightning.files import read_text, replacing, require_regular, write_text

MANIFEST, SHARDS = "text_cache.json", "shards"
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEY_BYTES = 16
MOST_SIDES, MOST_BYTES = 8, 1 << 40  # dimensions of a tensor and bytes of a prompt; a manifest that says more is none
KEY_TYPE = np.dtype(f"S{KEY_BYTES}")
PREFIX = "cond."
COMMAND = "python -m cdm_lightning.cache_text"


@dataclass(frozen=True)
class Manifest:
    """The properties that all shards of a text cache share, stored as text_cache.json.

    - `text_fingerprint`: `Backbone.text_fingerprint` of the text encoders that made the cache.
    - `dtype`: name of the dtype in which floating-point tensors are stored.
    - `tensors`: maps the name of each tensor to a dict with two entries. "shape" is the tensor's shape for one prompt,
      and "dtype" names the dtype in which the text encoders return the tensor.
    """

    text_fingerprint: dict[str, str]
    dtype: str
    tensors: dict[str, dict]
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """A hash of the manifest. Each shard stores it, so that a shard of another cache is recognised."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def bytes_per_prompt(self) -> int:
        """The number of bytes that one prompt takes in a shard, for its encoding, its key and its checksum."""
        sizes = (math.prod(entry["shape"]) * self.stored(name).itemsize for name, entry in self.tensors.items())
        return sum(sizes) + KEY_BYTES + 8

    def given(self, name: str) -> torch.dtype:
        """Return the dtype in which the text encoders return the tensor `name`."""
        return getattr(torch, self.tensors[name]["dtype"])

    def stored(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor `name` is stored.

        For a floating-point tensor this is `dtype`, and for any other tensor it is `given(name)`.
        """
        return DTYPES[self.dtype] if self.given(name).is_floating_point else self.given(name)

    @classmethod
    def of(cls, text_fingerprint: Mapping[str, str], dtype: str, cond: Mapping[str, Tensor]) -> "Manifest":
        """Return the manifest of a new cache that stores floating-point tensors in the dtype named `dtype`.

        `text_fingerprint` identifies the text encoders. `cond` is the encoding of any B prompts, tensors (B, ...) by
        name. The manifest stores the name and the dtype of each tensor, and its shape without B.
        """
        tensors = {
            name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in sorted(cond.items())
        }
        return cls(dict(text_fingerprint), dtype, tensors)


def prompt_key(prompt: str) -> bytes:
    """Return the key of a prompt, the BLAKE2b hash of its text in 16 bytes."""
    return hashlib.blake2b(prompt.encode(), digest_size=KEY_BYTES).digest()


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in a cache folder, or None if there is none. Raises `UserError` if it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    with suppress(Exception):  # whatever is wrong with it: the file may come from somebody else
        manifest = Manifest(**json.loads(read_text(path)))
        if is_sound(manifest):
            return manifest
    raise UserError(
        f"{path}: this version of cdm_lightning cannot read this text cache; make a new one in another folder with `{COMMAND}`"
    )


def is_sound(manifest: Manifest) -> bool:
    """Return whether a manifest has the present format, values of the right types, and tensors of a plausible size.

    `MOST_SIDES` limits the number of a tensor's dimensions, and `MOST_BYTES` the number of bytes for one prompt. If an
    entry is missing or has a wrong type, this function may raise an exception of any type instead of returning False.
    """
    texts = [part for pair in manifest.text_fingerprint.items() for part in pair]
    sides = [side for entry in manifest.tensors.values() for side in entry["shape"]]
    return (
        type(manifest.format) is int
        and manifest.format == FORMAT
        and manifest.dtype in DTYPES
        and all(isinstance(text, str) for text in texts)
        and all(
            isinstance(entry["shape"], list) and len(entry["shape"]) <= MOST_SIDES
            for entry in manifest.tensors.values()
        )
        and all(type(side) is int and 0 <= side <= MOST_BYTES for side in sides)
        and all(isinstance(manifest.given(name), torch.dtype) for name in manifest.tensors)
        and len(manifest.tensors) > 0
        and manifest.bytes_per_prompt <= MOST_BYTES
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Create the folder of a new cache and write its manifest."""
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def require_fingerprint(folder: Path, manifest: Manifest, fingerprint: Mapping[str, str]) -> None:
    """Raise `UserError` unless the text encoders of this run made the cache.

    `fingerprint` identifies the text encoders of this run. The message lists the entries of `fingerprint` and of the
    manifest that differ.
    """
    made, now = manifest.text_fingerprint, dict(fingerprint)
    differing = [
        f"{name} is {now.get(name)} now, but {made.get(name)} in the cache"
        for name in sorted(made.keys() | now.keys())
        if made.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"{folder}: other text encoders made this text cache ({'; '.join(differing)}); "
            f"make another cache with `{COMMAND}` and text_cache.folder=ANOTHER"
        )


def shard_paths(folder: Path) -> list[Path]:
    """Return the paths of all shards of a cache, sorted by name."""
    return sorted((folder / SHARDS).glob("*.safetensors"))


def write_shard(folder: Path, manifest: Manifest, keys: Sequence[bytes], cond: Mapping[str, Tensor]) -> Path:
    """Write a shard completely or not at all, and return its path.

    `keys` are the keys of the shard's n prompts. `cond` holds their encodings: tensors (n, ...) by name, in the dtypes
    that `manifest.stored` returns. Raises `UserError` if the shard cannot be written.
    """
    rows = {name: cond[name].contiguous() for name in manifest.tensors}
    path = folder / SHARDS / f"{hashlib.blake2b(b''.join(keys), digest_size=KEY_BYTES).hexdigest()}.safetensors"
    tensors = {PREFIX + name: value for name, value in rows.items()}
    tensors["keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
    sums = [check_sum({name: value[row] for name, value in rows.items()}) for row in range(len(keys))]
    tensors["crc32"] = torch.tensor(sums, dtype=torch.int64)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"cache": manifest.digest})
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); free disk space or make the folder writable, then run the command "
            "again (it keeps the earlier shards)"
        ) from error
    return path


def shard_keys(path: Path, manifest: Manifest) -> np.ndarray:
    """Return the keys (n,) of the prompts in a shard, as 16-byte strings.

    Raises `UserError` if the shard is damaged or was written for another cache.
    """
    with reading(path):
        with safe_open(require_regular(path), framework="pt") as file:
            owner = (file.metadata() or {}).get("cache")
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            found = {name: (part.get_shape(), part[:0].dtype) for name, part in parts.items()}
            rows = found["keys"][0][0]
            expected = {"keys": ([rows, KEY_BYTES], torch.uint8), "crc32": ([rows], torch.int64)}
            for name, entry in manifest.tensors.items():
                expected[PREFIX + name] = ([rows, *entry["shape"]], manifest.stored(name))
            if owner != manifest.digest or any(found.get(name) != of for name, of in expected.items()):
                raise UserError(f"{path}: this file belongs to another text cache; move it out of the folder")
            keys = file.get_tensor("keys").numpy()
        return np.ascontiguousarray(keys).view(KEY_TYPE)[:, 0]


def read_row(path: Path, manifest: Manifest, row: int) -> dict[str, Tensor]:
    """Return the encoding of the prompt in row `row` of a shard: tensors by name, without a batch dimension.

    The tensors have the dtypes in which they are stored. Raises `UserError` if the shard cannot be read or the row is
    damaged.
    """
    with reading(path), safe_open(require_regular(path), framework="pt") as file:
        cond = {name: file.get_slice(PREFIX + name)[row : row + 1][0] for name in manifest.tensors}
        expected = int(file.get_slice("crc32")[row : row + 1])
    if check_sum(cond) != expected:
        raise broken(path)
    return cond


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Return a context manager for code that reads the shard `path`.

    An error in its `with` block is raised as the `UserError` that `broken(path)` returns, unless the error is a
    `UserError` already.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise errors of many types for a wrong file
        raise broken(path) from error


def check_sum(cond: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of the bytes of one prompt's encoding. Its tensors are taken in the order of their names."""
    value = 0
    for name in sorted(cond):
        # pyrefly: ignore[bad-argument-type]  numpy declares its buffers for Python 3.12 and later only
        value = zlib.crc32(cond[name].contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def broken(path: Path) -> UserError:
    """Return, but do not raise, a `UserError` about the incomplete or damaged shard `path`."""
    return UserError(
        f"{path}: the file is incomplete or damaged; delete this file and run `{COMMAND}` again to write its prompts again"
    )
