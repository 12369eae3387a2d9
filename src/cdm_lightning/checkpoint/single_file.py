"""A checkpoint as one .safetensors file, for keeping or for other programs; a run can begin with it as with a folder."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cdm_lightning.checkpoint.folder import sync
from cdm_lightning.checkpoint.stored import HEADER, TRAINER, StoredCheckpoint
from cdm_lightning.errors import UserError

SUFFIX = ".safetensors"


def write_checkpoint(stored: StoredCheckpoint, output: Path) -> Path:
    """All of a checkpoint: networks, optimizers and counters; in memory once while it is written."""
    trainer = torch.frombuffer(bytearray(stored.trainer_bytes()), dtype=torch.uint8)
    return write_file({**stored.tensors(), TRAINER: trainer}, {HEADER: json.dumps(stored.record)}, output)


def write_weights(stored: StoredCheckpoint, network: str, dtype: torch.dtype, output: Path) -> Path:
    """The weights of one network under their own names; for a LoRA, those of the adapter."""
    weights = {name: value.to(dtype) for name, value in stored.network_weights(network).items()}
    return write_file(weights, {"network": network, "iteration": str(stored.iteration)}, output)


def write_file(tensors: dict[str, Tensor], header: Mapping[str, str], output: Path) -> Path:
    """Write a new .safetensors file, all of it or nothing."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"format": "pt", **header})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.rename(temporary, output)
        sync(output.parent)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return output


def check_file(output: Path) -> None:
    """UserError unless `output` is the name of a new .safetensors file."""
    if output.suffix != SUFFIX or output.exists():
        raise UserError(f"{output}: pass the name of a {SUFFIX} file that does not exist yet")
