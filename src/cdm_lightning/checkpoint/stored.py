"""A checkpoint on disk, opened: its record at once, its tensors when they are asked for.

Nothing is unpickled: tensors and their index are safetensors, the record is JSON, and what Lightning and callbacks keep
is read by torch with `weights_only`, which refuses code.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cdm_lightning import ranks
from cdm_lightning.checkpoint.folder import checkpoints_in, find_fault, read_marker
from cdm_lightning.checkpoint.tensors import load_tensors, stored_sizes
from cdm_lightning.errors import UserError

RECORD, TRAINER, SUFFIX = "state.json", "trainer.pt", ".safetensors"
HEADER = "cdm_lightning"  # in the header of a single file: the record
UNREADABLE = (RuntimeError, OSError, ValueError, KeyError, TypeError, EOFError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder, or the same in a single .safetensors file.

    `record` holds counters, fingerprint, world size and versions.
    """

    path: Path
    record: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.record["iteration"]

    @property
    def ema_updates(self) -> int:
        """Updates of the student's average; 0: it holds none."""
        return self.record["ema_updates"]

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """The roles whose networks were trained."""
        return tuple(self.record.get("optimizers", ()))

    @cached_property
    def sizes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """(shape, dtype) of each tensor by name; UserError if the files are none of safetensors."""
        try:
            sizes = stored_sizes(self.files)
        except UNREADABLE as error:
            raise UserError(
                f"{self.path}: its tensors cannot be read; no checkpoint of cdm_lightning at all"
            ) from error
        sizes.pop(TRAINER, None)
        return sizes

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read these tensors in place, each process what it holds of them."""
        load_tensors(tensors, self.files)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it, whole and on the CPU; in one process."""
        wanted = {name: of for name, of in self.sizes.items() if name.startswith(prefix)}
        found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in wanted.items()}
        load_tensors(found, self.files, alone=True)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def network_weights(self, name: str) -> dict[str, Tensor]:
        """State dict of the network `name`: student, student_ema or another trained role."""
        return self.tensors(f"networks.{name}.")

    def trainer_state(self) -> dict[str, Any]:
        """What Lightning's loops and the callbacks keep; UserError for anything but plain values and tensors."""
        try:
            return torch.load(io.BytesIO(self.trainer_bytes()), map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise UserError(f"{self.path}: its {TRAINER} cannot be read or holds more than plain values") from error

    def trainer_bytes(self) -> bytes:
        """The content of the file that `trainer_state` reads."""
        if self.path.is_dir():
            return (self.path / TRAINER).read_bytes()
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(TRAINER).numpy().tobytes()

    def find_fault(self) -> str | None:
        """What is wrong with its files, None if nothing is; the processes of a run share the reading."""
        if not self.path.is_dir():
            return None  # its header was read, and safetensors compares it with the length of the file
        sums = read_marker(self.path)
        names = sorted(sums)[ranks.rank() :: ranks.world_size()]
        return next((fault for fault in ranks.gather(find_fault(self.path, sums, names)) if fault), None)


def read_checkpoint(path: Path, fingerprint: str | None = None) -> StoredCheckpoint:
    """Open a checkpoint folder or single file; its checksums are not compared yet.

    Raises `UserError` if it is missing, unfinished, no checkpoint of this project, or, where a `fingerprint` is given,
    made with a backbone of another one.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.suffix == ".ckpt":
        raise UserError(f"{path}: a single-file checkpoint of an older version, or of another program; cannot be read")
    try:
        found = _open_folder(path) if path.is_dir() else _open_file(path)
        fingerprint_found, _ = found.record["fingerprint"], (found.iteration, found.ema_updates)
    except UNREADABLE as error:
        raise UserError(f"{path}: truncated, or no checkpoint of cdm_lightning at all; use another one") from error
    if fingerprint is not None and fingerprint_found != fingerprint:
        raise UserError(f"{path}: made with the backbone {fingerprint_found}, but the configuration has {fingerprint}")
    return found


def require_good(stored: StoredCheckpoint) -> StoredCheckpoint:
    """`stored` itself; UserError if sizes or checksums of its files are not those that were written."""
    if fault := stored.find_fault():
        raise UserError(f"{stored.path}: {fault}; use another checkpoint")
    return stored


def _open_folder(path: Path) -> StoredCheckpoint:
    sums = read_marker(path)
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    files = tuple(path / name for name in sorted(sums) if name.endswith(SUFFIX) and "/" not in name)
    return StoredCheckpoint(path, record, files)


def _open_file(path: Path) -> StoredCheckpoint:
    with safe_open(path, framework="pt") as file:
        return StoredCheckpoint(path, json.loads(file.metadata()[HEADER]), (path,))


def newest_checkpoint(folder: Path, refused: Callable[[Path, str], None] | None = None) -> StoredCheckpoint | None:
    """The newest good checkpoint of a folder, or None if it has none; UserError if it has some, all of them bad.

    Sizes and checksums of all its files are compared. `refused(path, why)` is told of bad newer ones; else a warning is
    given. All processes of a run find the same one.
    """
    candidates = ranks.from_first(checkpoints_in(folder))
    for path in reversed(candidates):
        stored, why = _try(path)
        if why is None:
            return stored
        if refused is None:
            warnings.warn(f"passed over: {why}", stacklevel=2)
        else:
            refused(path, why)
    if candidates:
        raise UserError(f"{folder}: none of its {len(candidates)} checkpoints is good; move them away to start anew")
    return None


def _try(path: Path) -> tuple[StoredCheckpoint | None, str | None]:
    """The checkpoint, or why it cannot be used, alike on all processes."""
    stored, why = None, None
    try:
        stored = read_checkpoint(path)
    except UserError as error:
        why = str(error)
    why = next((text for text in ranks.gather(why) if text), None)
    if why is None and stored is not None and (fault := stored.find_fault()):
        why = f"{path}: {fault}"
    return stored, why
