"""A checkpoint as one .safetensors file, for an archive or for other programs. A run can also start from it."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cdm_lightning.checkpoint.stored import ABOUT_HEADER, HEADER, TRAINER, StoredCheckpoint
from cdm_lightning.errors import UserError
from cdm_lightning.files import replacing

SUFFIX = ".safetensors"


def write_checkpoint(stored: StoredCheckpoint, output: Path) -> Path:
    """Write a whole checkpoint (networks, optimizers and counters) as the file `output`, and return its path.

    All tensors are held in host memory at once. Raises `UserError` if the checkpoint cannot be read or the file cannot be
    written.
    """
    trainer = torch.frombuffer(bytearray(stored.trainer_bytes()), dtype=torch.uint8)
    header = {HEADER: json.dumps(stored.record), ABOUT_HEADER: json.dumps(stored.about)}
    return write_file({**stored.tensors(), TRAINER: trainer}, header, output)


def write_weights(stored: StoredCheckpoint, network: str, dtype: torch.dtype, output: Path) -> Path:
    """Write the weights of one network, such as "student_ema", as the file `output`, and return its path.

    The weights are converted to `dtype`. For a network that is trained as a LoRA, only the adapter's weights are
    written. Raises `UserError` if the checkpoint cannot be read or has no such network, or if the file cannot be
    written.
    """
    weights = {name: value.to(dtype) for name, value in stored.network_weights(network).items()}
    return write_file(weights, {"network": network, "iteration": str(stored.iteration)}, output)


def write_file(tensors: dict[str, Tensor], header: Mapping[str, str], output: Path) -> Path:
    """Write `tensors` to the .safetensors file `output`, completely or not at all, and return its path.

    `header` is added to the metadata in the file's header. Raises `UserError` if the file cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", **header})
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); pass another path") from error
    return output


def check_file(output: Path) -> None:
    """Raise `UserError` unless the name of `output` ends in .safetensors and no file of this name exists yet."""
    if output.suffix != SUFFIX or output.exists():
        raise UserError(f"{output} must be a new file name that ends in {SUFFIX}; pass another name")
