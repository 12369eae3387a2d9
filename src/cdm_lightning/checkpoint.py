"""Checkpoints of a run: when they are written, which one a run goes on from, what is refused.

A file `iteration_0000500.ckpt` holds weights, both optimizers and counters, nothing that
`torch.load(weights_only=True)` would not read.
"""

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from cdm_lightning.errors import UserError

FILE_NAME = "iteration_{:07d}.ckpt"
FILE_PATTERN = re.compile(r"iteration_(\d{7,})\.ckpt")


class IterationCheckpoint(Checkpoint):
    """Saves to `folder` every `every` iterations and at the last one; keeps the newest `keep` files (None: all)."""

    def __init__(self, folder: str | Path, every: int = 500, keep: int | None = 2) -> None:
        if every < 1 or (keep is not None and keep < 1):
            raise UserError("checkpoint: every and keep must be at least 1")
        self.folder, self.every, self.keep = Path(folder), every, keep

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Save if this iteration is due; Lightning calls checkpoint callbacks last, when the state is whole."""
        iteration = trainer.global_step
        if iteration % self.every and iteration != trainer.max_steps and not trainer.should_stop:
            return
        trainer.save_checkpoint(self.folder / FILE_NAME.format(iteration))
        if self.keep is not None and trainer.is_global_zero:
            for old in checkpoints_in(self.folder)[: -self.keep]:
                old.unlink()


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes straight to the disk under a temporary name, then renames: no copy in memory, no half file.

    Lightning's own way holds the file twice in memory, which for SD3-Medium is more than 100 GB.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load_checkpoint(self, path: str | Path, *_: object, **__: object) -> dict[str, Any]:
        """Content of `path`, tensors mapped from the file, on the CPU; always with `weights_only`."""
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest iteration first; none if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := FILE_PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest readable checkpoint of a folder, or None if it has none; UserError if it has some, all unreadable."""
    candidates = checkpoints_in(folder)
    for path in reversed(candidates):
        try:
            read_checkpoint(path)
        except UserError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
        else:
            return path
    if candidates:
        raise UserError(
            f"{folder}: none of its {len(candidates)} checkpoints can be read; move them away to start anew"
        )
    return None


def read_checkpoint(path: Path, fingerprint: str | None = None) -> dict[str, Any]:
    """The content of a checkpoint, tensors mapped from the file, on the CPU.

    Raises `UserError` if it is missing, truncated, no checkpoint of this project, or, where a `fingerprint` is given,
    made with a backbone of another one.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        content = StreamedCheckpointIO().load_checkpoint(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated, or no checkpoint at all; use an older one") from error
    if not isinstance(content, dict) or "cdm" not in content:
        raise UserError(f"{path}: not a checkpoint of cdm_lightning")
    found = content["cdm"]["fingerprint"]
    if fingerprint is not None and found != fingerprint:
        raise UserError(f"{path}: made with the backbone {found}, but the configuration has {fingerprint}")
    return content


def network_weights(content: dict[str, Any], name: str) -> dict[str, Tensor]:
    """State dict of the network `name` (student, fake_score or student_ema) in the content of a checkpoint."""
    prefix = f"networks.{name}."
    return {key.removeprefix(prefix): value for key, value in content["state_dict"].items() if key.startswith(prefix)}
