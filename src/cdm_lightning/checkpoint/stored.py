"""An opened checkpoint. Its counters (state.json) are read when it is opened, its tensors when they are needed.

Reading is safe: tensors are safetensors, counters are JSON, and torch reads the states of Lightning and the callbacks with
`weights_only`, which refuses code.
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
FINITE = "finite"  # the entry of state.json that says that the weights were checked for NaN and infinity
OTHER = "use another checkpoint"
OPTIONAL = {  # entries of state.json that older versions may lack, with their types
    "optimizers": dict,
    "skipped_steps": dict,
    "skipped_in_a_row": dict,
    "world_size": int,
}
MOST_TRAINER = 1 << 33  # bytes of trainer.pt; it is large if the objective's state holds tensors
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
    """An opened checkpoint: a folder, or a single .safetensors file with the same content.

    `record` is the content of state.json. It holds "iteration" and other counters, the backbone's "fingerprint", the
    number of processes as "world_size", and the result of `plain_values_of` as "optimizers". `files` hold the tensors.
    """

    path: Path
    record: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def iteration(self) -> int:
        """The number of finished iterations."""
        return self.record["iteration"]

    @property
    def ema_updates(self) -> int:
        """The number of updates of the student's EMA; 0 if there is no EMA."""
        return self.record["ema_updates"]

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """The names of the networks that were trained, such as "student" and "fake_score"."""
        return tuple(self.record.get("optimizers", ()))

    @cached_property
    def about(self) -> dict[str, Any]:
        """The configuration and the inputs of the run that wrote the checkpoint: {"config": ..., "inputs": ...}.

        "inputs" is a `run.inputs.Inputs`. The result is {} for a checkpoint of an older version. Raises `UserError` if
        the file that stores them cannot be read.
        """
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
        """The (shape, dtype) of each tensor by name. Raises `UserError` if the files are no safetensors files."""
        try:
            if not self.files:
                raise FileNotFoundError("it holds no tensors")
            for file in self.files:  # the safetensors library checks the header; torch's reader does not
                with safe_open(require_regular(file), framework="pt"):
                    pass
            sizes = stored_sizes(self.files)
            require_room(sizes, sum(file.stat().st_size for file in self.files))
        except UNREADABLE as error:
            raise UserError(
                f"{self.path} is not a cdm_lightning checkpoint: its tensors cannot be read ({first_line(error)}); {OTHER}"
            ) from error
        sizes.pop(TRAINER, None)
        return sizes

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite this process's shards of `tensors` with the checkpoint's values. All processes must call this."""
        load_tensors(tensors, self.files)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Read the tensors whose names begin with `prefix`, unsharded, onto the CPU. One process can call this alone.

        The keys are the names without the prefix. Raises `UserError` if the files cannot be read.
        """
        wanted = {name: of for name, of in self.sizes.items() if name.startswith(prefix)}
        found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in wanted.items()}
        try:
            load_tensors(found, self.files, alone=True)
        except UNREADABLE as error:
            raise UserError(f"{self.path}: its tensors cannot be read ({first_line(error)}); {OTHER}") from error
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def network_weights(self, name: str) -> dict[str, Tensor]:
        """Read the state dict of a network, such as "student" or "student_ema".

        Raises UserError if the checkpoint does not have this network.
        """
        if found := self.tensors(f"networks.{name}."):
            return found
        raise UserError(f"{self.path} has no network {name}; pass --weights auto, or {OTHER}")

    def trainer_state(self) -> dict[str, Any]:
        """Read trainer.pt and return its content, which `objective_state.trainer_state` describes.

        Raises `UserError` if it cannot be read, or holds other objects than tensors, numbers, strings, lists and dicts.
        """
        try:
            state = torch.load(io.BytesIO(self.trainer_bytes()), map_location="cpu", weights_only=True)
        except (*UNREADABLE, AttributeError, IndexError) as error:
            raise UserError(
                f"{self.path}: {TRAINER} is damaged, or holds objects that are not safe to load; {OTHER}"
            ) from error
        if not isinstance(state, dict):
            raise UserError(f"{self.path}: {TRAINER} holds {type(state).__name__} instead of a dictionary; {OTHER}")
        return state

    def trainer_bytes(self) -> bytes:
        """Return the bytes of trainer.pt, which `trainer_state` reads."""
        if self.path.is_dir():
            with open_regular(self.path / TRAINER, MOST_TRAINER, follow=False) as file:
                return file.read()
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(TRAINER).numpy().tobytes()

    def find_fault(self) -> str | None:
        """Return a description of the checkpoint's first fault, such as "X is truncated: ...", or None.

        A fault is a missing or damaged file, or a weight that is not finite. The processes of a run divide the files
        among them, so all of them must call this. All get the same description.
        """
        fault = None
        if self.path.is_dir():  # for a single file, safetensors compares the header with the length
            sums = read_marker(self.path)
            fault = find_fault(self.path, sums, sorted(sums)[ranks.rank() :: ranks.world_size()])
        if fault is None and not self.record.get(FINITE):
            name = not_finite_in(self.files[ranks.rank() :: ranks.world_size()])
            fault = None if name is None else f"its weights are not finite ({name})"
        return next((fault for fault in ranks.gather(fault) if fault), None)


def read_checkpoint(path: Path, fingerprint: str | None = None) -> StoredCheckpoint:
    """Open a checkpoint, either a folder or a single file, without comparing the checksums of its files.

    Raises `UserError` if the checkpoint is missing, unfinished or not one of this project. `fingerprint` identifies the
    configured backbone (`Backbone.fingerprint`). If it is given, a checkpoint of another backbone raises `UserError`
    too.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; pass an existing one")
    if path.suffix == ".ckpt":
        raise UserError(f"{path}: this is a file of an older version, or of another program; {OTHER}")
    try:
        found = _open_folder(path) if path.is_dir() else _open_file(path)
    except (*UNREADABLE, AttributeError) as error:
        raise UserError(f"{path}: this is truncated, or not a cdm_lightning checkpoint; {OTHER}") from error
    where = path / RECORD if path.is_dir() else path
    given = {name: kind for name, kind in OPTIONAL.items() if name in found.record}
    require_entries(found.record, where, OTHER, fingerprint=str, iteration=int, ema_updates=int, **given)
    if fingerprint is not None and found.record["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} was trained with the backbone {found.record['fingerprint']}, but the configuration has {fingerprint}; "
            f"set the backbone that it was trained with, or {OTHER}"
        )
    return found


def require_room(sizes: Mapping[str, tuple[torch.Size, torch.dtype]], most: int) -> None:
    """Raise ValueError if tensors of the shapes and dtypes in `sizes` take more than `most` bytes.

    Also raises it if a dimension is negative. The sizes come from headers of files, which may be damaged or forged.
    """
    if any(side < 0 for size, _ in sizes.values() for side in size):
        raise ValueError("a tensor has a negative size")
    if sum(math.prod(size) * dtype.itemsize for size, dtype in sizes.values()) > most:
        raise ValueError("the tensors are larger than the files")


def require_good(stored: StoredCheckpoint) -> StoredCheckpoint:
    """Return `stored` if its files are undamaged. Raises `UserError` if `find_fault` finds a fault."""
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
    """Return the iteration in a checkpoint's state.json, or that in the folder's name if state.json cannot be read."""
    try:
        return read_checkpoint(path).iteration
    except UserError:
        return iteration_of(path)


def newest_checkpoint(folder: Path, refused: Callable[[Path, str], None] | None = None) -> StoredCheckpoint | None:
    """Return the newest undamaged checkpoint in a folder, or None if the folder has no checkpoint.

    The newest checkpoint has the highest iteration in its state.json. For each damaged checkpoint newer than the
    result, `refused(path, why)` is called, or a warning is issued if `refused` is None. Raises `UserError` if all
    checkpoints are damaged. All processes of a run must call this, and all get the same checkpoint.
    """
    candidates = ranks.from_first(sorted(checkpoints_in(folder), key=_age))
    faults = []
    for path in reversed(candidates):
        stored, why = _try(path)
        if why is None:
            return stored
        faults.append(why)
        if refused is None:
            warnings.warn(f"skipped a checkpoint: {why}", stacklevel=2)
        else:
            refused(path, why)
    if candidates:
        raise UserError(
            f"{folder}: all {len(candidates)} checkpoints are damaged ({faults[0]:.300}); move them away to start from scratch"
        )
    return None


def _age(path: Path) -> tuple[int, bool]:
    """Return the key by which checkpoints are sorted: the iteration in state.json, and whether the folder's name agrees with it."""
    iteration = recorded_iteration(path)
    return iteration, iteration_of(path) == iteration


def _try(path: Path) -> tuple[StoredCheckpoint | None, str | None]:
    """Open and check a checkpoint. Return it (or None) and the first fault (or None), which is the same on all processes."""
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
    """Return whether a checkpoint can be used: it opens, its weights are finite, and no network's last update was skipped."""
    try:
        stored = read_checkpoint(path)
        skipped = any(stored.record.get("skipped_in_a_row", {}).values())
        return not skipped and (bool(stored.record.get(FINITE)) or not_finite_in(stored.files) is None)
    except (UserError, OSError, AttributeError, SafetensorError):
        return False
