"""Write a checkpoint completely or not at all. All processes of a run write it together."""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_lightning.checkpoint.folder import FileSums, begin, commit, temporary_path, write_synced
from cdm_lightning.checkpoint.stored import ABOUT, RECORD, TRAINER
from cdm_lightning.checkpoint.tensors import save_tensors
from cdm_lightning.distributed import ranks


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    trainer_state: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    alone: bool = False,
) -> Path:
    """Write the checkpoint of iteration `record["iteration"]` into `folder` and return its path.

    All processes must call this. `tensors` are the tensors of the networks and of the optimizer states by name, as
    `state.tensors_of` returns them. `record` is the content of state.json, and `trainer_state` is the content of
    trainer.pt. `about` is the run's configuration and inputs (see `StoredCheckpoint.about`). If the checkpoint cannot
    be written, all processes raise OSError, and earlier checkpoints stay unchanged. `alone` is that of `save_tensors`.
    """
    temporary = temporary_path(folder, record["iteration"])
    try:
        _on_first(lambda: begin(folder, record["iteration"]))
        sums: FileSums = {}
        for of_rank in ranks.gather(save_tensors(tensors, temporary, alone)):
            sums |= of_rank
        return Path(_on_first(lambda: _finish(temporary, sums, record, trainer_state, about)))
    except OSError:
        if ranks.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _finish(
    temporary: Path,
    sums: FileSums,
    record: Mapping[str, Any],
    trainer_state: Mapping[str, Any],
    about: Mapping[str, Any] | None,
) -> str:
    packed = io.BytesIO()
    torch.save(dict(trainer_state), packed)
    sums[TRAINER] = write_synced(temporary / TRAINER, packed.getvalue())
    sums[RECORD] = write_synced(temporary / RECORD, json.dumps(record, indent=1).encode())
    if about is not None:
        sums[ABOUT] = write_synced(temporary / ABOUT, json.dumps(about, indent=1).encode())
    return str(commit(temporary, sums))


def _on_first(work: Any) -> Any:
    """Run `work` on the first process. All processes return the result of `work`, or raise the OSError that it raised."""
    result, error = None, None
    if ranks.rank() == 0:
        try:
            result = work()
        except OSError as caught:
            error = caught
    ranks.agree(error)
    return ranks.from_first(result)
