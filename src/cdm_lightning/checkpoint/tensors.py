"""Write and read the tensors of a checkpoint with torch.distributed.checkpoint, as safetensors files.

Each process writes its own shards. Each process reads the shards that it needs, even if the run that wrote the
checkpoint had another number of processes and therefore other shards. The format contains no pickle; torch's default
format has a pickle as its index.
"""

import os
import warnings
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cdm_lightning.checkpoint.folder import FileSums
from cdm_lightning.distributed.ranks import is_spread, world_size

WRITES_ALONE = ".*torch.distributed is (disabled|unavailable).*"  # a warning of torch
FILE_BYTES = 1 << 29  # approximate size of a file; it is limited, because a whole file is built in memory


class _Summed:
    """A wrapper of a file that computes the file's size and checksum while it is written, so that it is not read again for this."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.bytes, self.crc32 = file, 0, 0

    def write(self, content: Any) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        self.bytes += len(content)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _SummedFiles(FileSystem):
    """A file system that remembers the size and checksum of each file that is written."""

    def __init__(self) -> None:
        self.sums: FileSums = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any]:
        with Path(path).open(mode) as file:
            summed = _Summed(file)
            yield summed
        self.sums[Path(path).name] = {"bytes": summed.bytes, "crc32": summed.crc32}


class _GivenFiles(FileSystem):
    """A file system that shows only the given files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [str(file) for file in files]

    def ls(self, path: str | os.PathLike) -> list[str]:
        return self.files


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, alone: bool = False) -> FileSums:
    """Write this process's shards of the tensors (plain or DTensor, by name) to .safetensors files in `folder`.

    Returns {file name: {"bytes": size, "crc32": checksum}} of the files that this process wrote. All processes must call this
    with the same names. If one process cannot write, all raise OSError. With `alone`, this is the only process, and it may call
    this in a thread, if torch's warning `WRITES_ALONE` is filtered out.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), files_of(tensors), save_distributed=True)
    writer.fs = files = _SummedFiles()
    with nullcontext() if alone else quietly():
        try:
            dcp.save(dict(tensors), storage_writer=writer, no_dist=alone or not is_spread())
        except CheckpointException as error:
            raise_cause(error)
    return files.sums


def load_tensors(tensors: dict[str, Tensor], files: Sequence[Path], alone: bool = False) -> None:
    """Overwrite each of `tensors` in place with the values that a checkpoint's files hold under its name.

    Either all processes call this together, or one process with `alone=True`. Raises RuntimeError if the files hold no
    tensor of one of the names, or a tensor of another shape.
    """
    with quietly():
        try:
            dcp.load(tensors, storage_reader=reader(files), no_dist=alone or not is_spread())
        except CheckpointException as error:
            raise_cause(error)


def stored_sizes(files: Sequence[Path]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return {name: (shape, dtype)} of the tensors in the files, read from the headers of the files."""
    metadata = reader(files).read_metadata().state_dict_metadata
    tensors = cast(dict[str, TensorStorageMetadata], metadata)  # these files hold only tensors
    return {name: (of.size, of.properties.dtype) for name, of in tensors.items()}


def reader(files: Sequence[Path]) -> dcp.HuggingFaceStorageReader:
    """Return a reader that reads only the given files, not all files in their folder."""
    made = dcp.HuggingFaceStorageReader(str(files[0].parent))
    made.fs = _GivenFiles(files)
    return made


def files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Divide the tensors among numbered files, and return {name of a tensor: number of its file}. Numbers start at 1.

    Each process writes one file for each number, with its own shards of the tensors that have this number. A file has
    about `FILE_BYTES` bytes.
    """
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() // world_size()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    return numbers


def raise_cause(error: CheckpointException) -> None:
    """Raise the cause of `error`: OSError if a file could not be read or written, otherwise RuntimeError.

    This is needed because `CheckpointException` is not a subclass of Exception, so `except Exception` does not catch it.
    """
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror or str(cause)) from cause
    raise RuntimeError(str(causes[0])) from causes[0]


@contextmanager
def quietly() -> Generator[None]:
    """Inside the `with` block, hide torch's warning that a single process saves or loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=WRITES_ALONE)
        yield
