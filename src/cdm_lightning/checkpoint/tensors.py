"""Tensors to and from the files of a checkpoint, by torch.distributed.checkpoint in its safetensors form.

Each process writes the shards that it holds and reads those that it needs, whatever the layout was when they were
written. There is no pickle in it: unlike torch's own form, which keeps its index in one.
"""

import os
import warnings
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cdm_lightning.checkpoint.folder import FileSums
from cdm_lightning.ranks import is_spread, world_size

FILE_BYTES = 1 << 29  # a file is put together in memory: about so much of it at a time


class _Summed:
    """A file whose size and checksum are known when it is written: nothing has to be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.bytes, self.crc32 = file, 0, 0

    def write(self, content: Any) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        self.bytes += len(content)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _SummedFiles(FileSystem):
    """The file system, keeping the sums of all that is written."""

    def __init__(self) -> None:
        self.sums: FileSums = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any]:
        with Path(path).open(mode) as file:
            summed = _Summed(file)
            yield summed
        self.sums[Path(path).name] = {"bytes": summed.bytes, "crc32": summed.crc32}


class _GivenFiles(FileSystem):
    """The file system, of which only these files are seen."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [str(file) for file in files]

    def ls(self, path: str | os.PathLike) -> list[str]:
        return self.files


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> FileSums:
    """Write this process's shards of `tensors` (name: tensor or DTensor) into `folder`; the sums of its files.

    All processes call it with the same names. OSError on all of them if one cannot write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), files_of(tensors), save_distributed=True)
    writer.fs = files = _SummedFiles()
    with quietly():
        try:
            dcp.save(dict(tensors), storage_writer=writer, no_dist=not is_spread())
        except CheckpointException as error:
            raise_cause(error)
    return files.sums


def load_tensors(tensors: dict[str, Tensor], files: Sequence[Path], alone: bool = False) -> None:
    """Fill `tensors` in place from a checkpoint's files; all processes together, unless `alone`.

    Raises RuntimeError if a name is missing or a shape does not fit.
    """
    with quietly():
        try:
            dcp.load(tensors, storage_reader=reader(files), no_dist=alone or not is_spread())
        except CheckpointException as error:
            raise_cause(error)


def stored_sizes(files: Sequence[Path]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """(shape, dtype) of each tensor in a checkpoint's files, from their headers."""
    metadata = reader(files).read_metadata().state_dict_metadata
    tensors = cast(dict[str, TensorStorageMetadata], metadata)  # these files hold nothing else
    return {name: (of.size, of.properties.dtype) for name, of in tensors.items()}


def reader(files: Sequence[Path]) -> dcp.HuggingFaceStorageReader:
    """A reader of exactly these files."""
    made = dcp.HuggingFaceStorageReader(str(files[0].parent))
    made.fs = _GivenFiles(files)
    return made


def files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of the file of each tensor, from 1: as many in one as `FILE_BYTES` holds."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() // world_size()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    return numbers


def raise_cause(error: CheckpointException) -> None:
    """Raise what went wrong: OSError if that was a file, else RuntimeError; the original one is no Exception."""
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror or str(cause)) from cause
    raise RuntimeError(str(causes[0])) from causes[0]


@contextmanager
def quietly() -> Generator[None]:
    """Without the warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        yield
