"""A checkpoint as one .safetensors file, to archive it or to use it elsewhere; a run can start from it as from a folder."""

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
    """Write a whole checkpoint (networks, optimizers and counters) as the file `output`, and return the path.

    All its tensors are in host memory meanwhile. Raises `UserError` if it cannot be read or written.
    """
    trainer = torch.frombuffer(bytearray(stored.trainer_bytes()), dtype=torch.uint8)
    header = {HEADER: json.dumps(stored.record), ABOUT_HEADER: json.dumps(stored.about)}
    return write_file({**stored.tensors(), TRAINER: trainer}, header, output)


def write_weights(stored: StoredCheckpoint, network: str, dtype: torch.dtype, output: Path) -> Path:
    """Write the weights of `network`, such as "student_ema", in `dtype` as the file `output`, and return the path.

    Of a network that is a LoRA, only the adapter's weights are in a checkpoint. Raises `UserError` as `write_checkpoint` does,
    and if the checkpoint has no such network.
    """
    weights = {name: value.to(dtype) for name, value in stored.network_weights(network).items()}
    return write_file(weights, {"network": network, "iteration": str(stored.iteration)}, output)


def write_file(tensors: dict[str, Tensor], header: Mapping[str, str], output: Path) -> Path:
    """Write a .safetensors file, completely or not at all; raise `UserError` if it cannot be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", **header})
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); pass another path") from error
    return output


def check_file(output: Path) -> None:
    """Raise `UserError` unless `output` is the name of a .safetensors file that does not exist yet."""
    if output.suffix != SUFFIX or output.exists():
        raise UserError(f"{output}: pass the name of a {SUFFIX} file that does not exist yet")
