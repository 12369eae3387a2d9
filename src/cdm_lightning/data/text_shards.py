"""The files of a text cache: what `cache_text` writes and training reads.

    DIR/text_cache.json            the fingerprint of the text encoders, the stored dtype, shape and dtype of each tensor
    DIR/shards/HASH.safetensors    some hundred megabytes of prompts: "keys" (n, 16) uint8, "crc32" (n,) int64, and the
                                   conditioning "cond.NAME" (n, ...); HASH is that of the keys

A prompt's key is a hash of its text. Everything is written under another name and renamed when it is whole; each row has
a check sum, so a damaged one is noticed when it is used.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdm_lightning.errors import UserError

MANIFEST, SHARDS = "text_cache.json", "shards"
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEY_BYTES = 16
KEY_TYPE = np.dtype(f"S{KEY_BYTES}")
PREFIX = "cond."
COMMAND = "python -m cdm_lightning.cache_text"


@dataclass(frozen=True)
class Manifest:
    """What all shards of a cache have in common.

    `dtype` is that of floating-point tensors in the files; `tensors` gives for each {"shape": of one prompt, "dtype": as
    the text encoders gave it}.
    """

    text_fingerprint: dict[str, str]
    dtype: str
    tensors: dict[str, dict]
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Short name of the cache's content, in every shard."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def bytes_per_prompt(self) -> int:
        """Bytes that one prompt takes in a shard."""
        sizes = (
            np.prod(entry["shape"], dtype=int) * self.stored(name).itemsize for name, entry in self.tensors.items()
        )
        return int(sum(sizes)) + KEY_BYTES + 8

    def given(self, name: str) -> torch.dtype:
        """The dtype in which the text encoders gave this tensor."""
        return getattr(torch, self.tensors[name]["dtype"])

    def stored(self, name: str) -> torch.dtype:
        """The dtype of this tensor in the files: masks and the like stay as they are."""
        return DTYPES[self.dtype] if self.given(name).is_floating_point else self.given(name)

    @classmethod
    def of(cls, text_fingerprint: Mapping[str, str], dtype: str, cond: Mapping[str, Tensor]) -> "Manifest":
        """The manifest of a cache whose conditioning is like `cond` (B, ...)."""
        tensors = {
            name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in sorted(cond.items())
        }
        return cls(dict(text_fingerprint), dtype, tensors)


def prompt_key(prompt: str) -> bytes:
    """The key of a prompt: BLAKE2b of its text, 16 bytes."""
    return hashlib.blake2b(prompt.encode(), digest_size=KEY_BYTES).digest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a cache folder, None if it has none; UserError if it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        if manifest.format == FORMAT and manifest.dtype in DTYPES and manifest.bytes_per_prompt > 0:
            return manifest
    raise UserError(f"{path}: not a text cache that this version reads; make it anew in another folder")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the folder of a new cache."""
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{MANIFEST}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def require_fingerprint(folder: Path, manifest: Manifest, fingerprint: Mapping[str, str]) -> None:
    """UserError, naming what differs, unless the cache was made with text encoders of this fingerprint."""
    made, now = manifest.text_fingerprint, dict(fingerprint)
    differing = [
        f"{name} is {now.get(name)}, was {made.get(name)}"
        for name in sorted(made.keys() | now.keys())
        if made.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"{folder}: a text cache of other text encoders ({'; '.join(differing)}); "
            f"make another with `{COMMAND}` and text_cache.folder=ANOTHER"
        )


def shard_paths(folder: Path) -> list[Path]:
    """All shards of a cache."""
    return sorted((folder / SHARDS).glob("*.safetensors"))


def write_shard(folder: Path, manifest: Manifest, keys: Sequence[bytes], cond: Mapping[str, Tensor]) -> Path:
    """Write the conditioning (n, ...) of the prompts with these keys, in the stored dtypes, whole or not at all.

    Raises `UserError` if the file cannot be written.
    """
    rows = {name: cond[name].contiguous() for name in manifest.tensors}
    path = folder / SHARDS / f"{hashlib.blake2b(b''.join(keys), digest_size=KEY_BYTES).hexdigest()}.safetensors"
    tensors = {PREFIX + name: value for name, value in rows.items()}
    tensors["keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
    sums = [check_sum({name: value[row] for name, value in rows.items()}) for row in range(len(keys))]
    tensors["crc32"] = torch.tensor(sums, dtype=torch.int64)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"cache": manifest.digest})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); the shards before it are whole, run it again") from error
    return path


def shard_keys(path: Path, manifest: Manifest) -> np.ndarray:
    """Keys (n,) of a shard's prompts; UserError for a shard that is half-written or belongs to another cache."""
    try:
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("cache")
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dictionary
            keys = file.get_tensor("keys").numpy()
    except (SafetensorError, OSError, ValueError) as error:
        raise broken(path) from error
    expected = {PREFIX + name: [len(keys), *entry["shape"]] for name, entry in manifest.tensors.items()}
    if owner != manifest.digest or any(shapes.get(name) != shape for name, shape in expected.items()):
        raise UserError(f"{path}: a shard of another text cache; move it away")
    return np.ascontiguousarray(keys).view(KEY_TYPE)[:, 0]


def read_row(path: Path, manifest: Manifest, row: int) -> dict[str, Tensor]:
    """The conditioning (...) of a shard's prompt number `row`, in the stored dtypes; UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            cond = {name: file.get_slice(PREFIX + name)[row : row + 1][0] for name in manifest.tensors}
            expected = int(file.get_slice("crc32")[row : row + 1])
    except (SafetensorError, OSError, ValueError) as error:
        raise broken(path) from error
    if check_sum(cond) != expected:
        raise broken(path)
    return cond


def check_sum(cond: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of one prompt's conditioning."""
    value = 0
    for name in sorted(cond):
        # pyrefly: ignore[bad-argument-type]  numpy declares its buffers for Python 3.12 and later only
        value = zlib.crc32(cond[name].contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def broken(path: Path) -> UserError:
    """The error of a shard that is not whole."""
    return UserError(
        f"{path}: half-written or damaged; delete this file and run `{COMMAND}` again, it adds what is missing"
    )
