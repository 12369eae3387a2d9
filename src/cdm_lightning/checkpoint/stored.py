"""An opened checkpoint: its record is read when it is opened, its tensors when they are needed.

No file is unpickled without restrictions: tensors and their index are safetensors, the record is JSON, and the state of
Lightning and the callbacks is read by torch with `weights_only`, which refuses code.
"""

import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cdm_lightning.checkpoint.folder import checkpoints_in, find_fault, iteration_of, read_marker
from cdm_lightning.checkpoint.health import not_finite_in
from cdm_lightning.checkpoint.tensors import load_tensors, stored_sizes
from cdm_lightning.distributed import ranks
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, open_regular, read_record, require_entries, require_regular, restoring

RECORD, TRAINER, ABOUT, SUFFIX = "state.json", "trainer.pt", "run.json", ".safetensors"
HEADER, ABOUT_HEADER = (
    "cdm_lightning",
    "cdm_lightning_run",
)  # the keys of state.json and run.json in a single file's header
FINITE = "finite"  # the entry of the record which says that the weights were checked for NaN and infinity
OTHER = "use another checkpoint"  # the cure of a broken one
MOST_TRAINER = 1 << 33  # bytes: the objective may keep tensors in it
UNREADABLE = (
    RuntimeError,
    RecursionError,
    MemoryError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint, either a folder or a single .safetensors file with the same content.

    `record` holds counters, fingerprint and world size; `about` says of which run it is (see there).
    """

    path: Path
    record: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def iteration(self) -> int:
        """The number of iterations done."""
        return self.record["iteration"]

    @property
    def ema_updates(self) -> int:
        """The number of updates of the student's EMA; 0 if the checkpoint holds no EMA."""
        return self.record["ema_updates"]

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """The roles whose networks were trained."""
        return tuple(self.record.get("optimizers", ()))

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the run was: {"config": its configuration, "inputs": its prompt and model files}; empty from older versions."""
        path = self.path / ABOUT if self.path.is_dir() else self.path
        if self.path.is_dir():
            found = read_record(path, OTHER) if ABOUT in read_marker(self.path) else {}
        else:
            with restoring(path, OTHER), safe_open(path, framework="pt") as file:
                found = dict(json.loads((file.metadata() or {}).get(ABOUT_HEADER, "{}")))
        if found:
            require_entries(found, path, OTHER, config=dict, inputs=dict)
        return found

    @cached_property
    def sizes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """(shape, dtype) of each tensor by name; raises `UserError` if the files are not safetensors files."""
        try:
            if not self.files:
                raise FileNotFoundError("it holds no tensors")
            for file in self.files:  # the safetensors library checks the header, torch's reader believes it
                with safe_open(require_regular(file), framework="pt"):
                    pass
            sizes = stored_sizes(self.files)
            require_room(sizes, sum(file.stat().st_size for file in self.files))
        except UNREADABLE as error:
            raise UserError(
                f"{self.path}: its tensors cannot be read; this is not a cdm_lightning checkpoint"
            ) from error
        sizes.pop(TRAINER, None)
        return sizes

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Fill these tensors in place; each process reads the shards that it holds."""
        load_tensors(tensors, self.files)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Read whole tensors to the CPU, in this process alone: those whose names begin with `prefix`, which is removed."""
        wanted = {name: of for name, of in self.sizes.items() if name.startswith(prefix)}
        found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in wanted.items()}
        try:
            load_tensors(found, self.files, alone=True)
        except UNREADABLE as error:
            raise UserError(
                f"{self.path}: its tensors cannot be read ({first_line(error)}); use another one"
            ) from error
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def network_weights(self, name: str) -> dict[str, Tensor]:
        """Read the state dict of the network `name`: student, student_ema or another trained role.

        Raises UserError if the checkpoint does not have this network.
        """
        if found := self.tensors(f"networks.{name}."):
            return found
        raise UserError(f"{self.path} holds no network {name}; choose another one")

    def trainer_state(self) -> dict[str, Any]:
        """Read the state of Lightning's loops, callbacks and objective; `UserError` for more than plain values and tensors."""
        try:
            state = torch.load(io.BytesIO(self.trainer_bytes()), map_location="cpu", weights_only=True)
        except (*UNREADABLE, AttributeError, IndexError) as error:
            raise UserError(f"{self.path}: its {TRAINER} cannot be read or holds more than plain values") from error
        if not isinstance(state, dict):
            raise UserError(f"{self.path}: its {TRAINER} holds {type(state).__name__}, not a dictionary; {OTHER}")
        return state

    def trainer_bytes(self) -> bytes:
        """Return the content of the file that `trainer_state` reads."""
        if self.path.is_dir():
            with open_regular(self.path / TRAINER, MOST_TRAINER, follow=False) as file:
                return file.read()
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(TRAINER).numpy().tobytes()

    def find_fault(self) -> str | None:
        """Describe the first fault in the files, None if there is none; the processes of a run share the reading.

        A fault is also a weight that is not finite; older versions did not look for that when they saved.
        """
        fault = None
        if self.path.is_dir():  # of a file, safetensors compares the header with the length
            sums = read_marker(self.path)
            fault = find_fault(self.path, sums, sorted(sums)[ranks.rank() :: ranks.world_size()])
        if fault is None and not self.record.get(FINITE):
            name = not_finite_in(self.files[ranks.rank() :: ranks.world_size()])
            fault = None if name is None else f"its weights are not finite ({name})"
        return next((fault for fault in ranks.gather(fault) if fault), None)


def read_checkpoint(path: Path, fingerprint: str | None = None) -> StoredCheckpoint:
    """Open a checkpoint folder or single file; its checksums are not compared yet.

    Raises `UserError` if it is missing, unfinished, not a checkpoint of this project, or, if a `fingerprint` is given, made
    with a backbone that has another fingerprint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; pass an existing one")
    if path.suffix == ".ckpt":
        raise UserError(
            f"{path}: this file of an older version, or of another program, cannot be read; use another one"
        )
    try:
        found = _open_folder(path) if path.is_dir() else _open_file(path)
    except (*UNREADABLE, AttributeError) as error:
        raise UserError(f"{path}: truncated, or not a cdm_lightning checkpoint; use another one") from error
    where = path / RECORD if path.is_dir() else path
    require_entries(found.record, where, OTHER, fingerprint=str, iteration=int, ema_updates=int)
    if fingerprint is not None and found.record["fingerprint"] != fingerprint:
        raise UserError(
            f"{path}: made with the backbone {found.record['fingerprint']}, but the configuration has {fingerprint}"
        )
    return found


def require_room(sizes: Mapping[str, tuple[torch.Size, torch.dtype]], most: int) -> None:
    """Raise ValueError if tensors of these sizes take more than `most` bytes: the headers of files can say anything."""
    if any(side < 0 for size, _ in sizes.values() for side in size):
        raise ValueError("a tensor has a negative size")
    if sum(math.prod(size) * dtype.itemsize for size, dtype in sizes.values()) > most:
        raise ValueError("the tensors are larger than the files")


def require_good(stored: StoredCheckpoint) -> StoredCheckpoint:
    """Return `stored` unchanged; raise `UserError` if the size or checksum of a file is not the one recorded."""
    if fault := stored.find_fault():
        raise UserError(f"{stored.path}: {fault}; use another checkpoint")
    return stored


def _open_folder(path: Path) -> StoredCheckpoint:
    sums = read_marker(path)
    record = read_record(path / RECORD, OTHER)
    files = tuple(path / name for name in sorted(sums) if name.endswith(SUFFIX) and "/" not in name)
    return StoredCheckpoint(path, record, files)


def _open_file(path: Path) -> StoredCheckpoint:
    with safe_open(require_regular(path), framework="pt") as file:
        return StoredCheckpoint(path, dict(json.loads(file.metadata()[HEADER])), (path,))


def recorded_iteration(path: Path) -> int:
    """Return the iteration in a checkpoint's record, or that in its name if the record cannot be read."""
    try:
        return read_checkpoint(path).iteration
    except UserError:
        return iteration_of(path)


def newest_checkpoint(folder: Path, refused: Callable[[Path, str], None] | None = None) -> StoredCheckpoint | None:
    """Return the newest good checkpoint of a folder, None if it has no checkpoint; raise `UserError` if all are bad.

    The sizes and checksums of all files of a checkpoint are compared. Which one is newest is decided by the iterations in their
    records, not by their names. `refused(path, why)` is called for each newer, bad checkpoint; without it a warning is issued.
    All processes of a run find the same checkpoint.
    """
    candidates = ranks.from_first(sorted(checkpoints_in(folder), key=_age))
    for path in reversed(candidates):
        stored, why = _try(path)
        if why is None:
            return stored
        if refused is None:
            warnings.warn(f"skipped a checkpoint: {why}", stacklevel=2)
        else:
            refused(path, why)
    if candidates:
        raise UserError(
            f"{folder}: none of its {len(candidates)} checkpoints is good; move them away to start from scratch"
        )
    return None


def _age(path: Path) -> tuple[int, bool]:
    """Sort by the recorded iteration, and of two with the same one, prefer the one that has it in its name."""
    iteration = recorded_iteration(path)
    return iteration, iteration_of(path) == iteration


def _try(path: Path) -> tuple[StoredCheckpoint | None, str | None]:
    """Open a checkpoint and return it, or the reason why it cannot be used; the reason is the same on all processes."""
    stored, why = None, None
    try:
        stored = read_checkpoint(path)
    except UserError as error:
        why = str(error)
    why = next((text for text in ranks.gather(why) if text), None)
    if why is None and stored is not None and (fault := stored.find_fault()):
        why = f"{path}: {fault}"
    return stored, why


def is_healthy(path: Path) -> bool:
    """Return whether a checkpoint can be read, was written after an update that was not skipped, and has finite weights."""
    try:
        stored = read_checkpoint(path)
        skipped = any(stored.record.get("skipped_in_a_row", {}).values())
        return not skipped and (bool(stored.record.get(FINITE)) or not_finite_in(stored.files) is None)
    except (UserError, OSError, AttributeError, SafetensorError):
        return False
