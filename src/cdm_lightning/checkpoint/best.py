"""Two small files beside the checkpoints: best.json names the best checkpoint, and validated.json the last validation."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm_lightning.checkpoint.folder import checkpoints_in, iteration_of, remove
from cdm_lightning.checkpoint.messages import say
from cdm_lightning.errors import UserError
from cdm_lightning.files import read_record, require_entries, write_text

BEST, VALIDATED = "best.json", "validated.json"


def is_logged(figure: str, logged: Collection[str]) -> bool:
    """Return whether validation will log the figure `figure`.

    `logged` holds the name "val/METRIC/SAMPLER" for each metric and sampler of the validation. If a metric has several
    figures, they are logged as "val/METRIC_FIGURE/SAMPLER", so `figure` may be such a name too.
    """
    *_, metric, sampler = ["", *figure.removeprefix("val/").rsplit("/", 1)]
    names = {tuple(name.removeprefix("val/").rsplit("/", 1)) for name in logged}
    return any(sampler == of and (metric == name or metric.startswith(f"{name}_")) for name, of in names)


@dataclass(frozen=True)
class Best:
    """The checkpoint in `folder` with the best value so far of the validation metric `metric`.

    `best_is` says whether the smallest ("min") or the largest ("max") value is best. `metric` is a name such as
    "val/clip_score/student_4"; if it is None, no checkpoint is best.
    """

    folder: Path
    metric: str | None
    best_is: str = "min"

    def check(self, logged: Collection[str]) -> None:
        """Raise `UserError` if validation will not log the figure `metric`.

        `logged` holds the name "val/METRIC/SAMPLER" for each metric and sampler of the validation. If a metric has
        several figures, they are logged as "val/METRIC_FIGURE/SAMPLER", so `metric` may be such a name too.
        """
        if self.metric is None:
            return
        if not is_logged(self.metric, logged):
            known = ", ".join(sorted(logged))
            cure = (
                f"set it to one of these: {known}" if known else "set metric=[NAME] and validation.samplers to log one"
            )
            raise UserError(f"checkpoint.best={self.metric} must be a figure that validation logs; {cure}")

    def read(self) -> dict[str, Any] | None:
        """Return {"metric": name, "value": float, "iteration": int} of the best checkpoint, or None.

        None means that best.json does not exist, that the metric in best.json is not `metric`, or that the checkpoint
        named in best.json was deleted. Raises `UserError` if best.json is damaged.
        """
        path, cure = self.folder / BEST, "remove it; the next validation writes it again"
        try:
            found = read_record(path, cure)
        except FileNotFoundError:
            return None
        require_entries(found, path, cure, metric=str, value=(int, float), iteration=int)
        if not math.isfinite(found["value"]):
            raise UserError(f"{path}: the value {found['value']} is not finite; {cure}")
        kept = {iteration_of(path) for path in checkpoints_in(self.folder)}
        return found if found["metric"] == self.metric and found["iteration"] in kept else None

    def is_improved_by(self, value: float) -> bool:
        """Return whether `value` is better than the value of the best checkpoint.

        If there is no best checkpoint yet, every finite value is better. NaN and infinity are never better.
        """
        if not math.isfinite(value):
            return False
        best = self.read()
        return best is None or (value < best["value"] if self.best_is == "min" else value > best["value"])

    def note(self, value: float, iteration: int) -> None:
        """Write to best.json that the checkpoint of `iteration` is the best, with the value `value` of the metric.

        Raises OSError if the file cannot be written.
        """
        write_text(self.folder / BEST, json.dumps({"metric": self.metric, "value": value, "iteration": iteration}))


def note_validation(folder: Path, iteration: int) -> None:
    """Write to validated.json that the validation of `iteration` is done. Raises OSError if the file cannot be written."""
    write_text(folder / VALIDATED, json.dumps({"iteration": iteration}))


def last_validation(folder: Path) -> int:
    """Return the iteration of the last finished validation, or -1 if there was none.

    Raises `UserError` if validated.json is damaged.
    """
    path, cure = folder / VALIDATED, "remove it; a validation is then made again"
    try:
        found = read_record(path, cure)
    except FileNotFoundError:
        return -1
    require_entries(found, path, cure, iteration=int)
    return found["iteration"]


def drop_old(folder: Path, keep: int | None, best: Best) -> None:
    """Delete all checkpoints in `folder` but the newest `keep` ones and the best one; None keeps all."""
    try:
        kept = best.read()
    except UserError as error:  # deletes nothing, because the best checkpoint is unknown
        say(f"WARNING: {error}")
        return
    plain = [path for path in checkpoints_in(folder) if kept is None or iteration_of(path) != kept["iteration"]]
    for old in plain[:-keep] if keep is not None else []:
        try:
            remove(old)
        except OSError as error:
            say(f"WARNING: {old} could not be deleted ({error.strerror or error})")
