"""What a run prints about its checkpoints."""

import shutil
import sys
from pathlib import Path

from cdm_lightning.checkpoint.folder import checkpoints_in
from cdm_lightning.distributed import ranks
from cdm_lightning.ends import signals
from cdm_lightning.errors import UserError


def report_failure(folder: Path, error: OSError, iteration: int, needed: bool) -> None:
    """Print that the checkpoint of `iteration` could not be written to `folder` because of `error`.

    If the checkpoint is `needed`, raises `UserError` with this message instead.
    """
    older = checkpoints_in(folder)
    free = shutil.disk_usage(folder if folder.exists() else Path.cwd()).free / 1e9
    text = (
        f"the checkpoint of iteration {iteration} could not be written to {folder} "
        f"({error.strerror or error}; {free:.1f} GB are free); "
        f"{f'{older[-1].name} is intact' if older else 'there is no earlier checkpoint'}"
    )
    if needed:
        raise UserError(f"{text}; free disk space and run the same command again to continue") from error
    say(f"WARNING: {text}; the run continues and tries again at the next save")


def say_stopped(iteration: int, path: Path | None) -> None:
    """Print that a signal has stopped the run, and where it is saved. `path` is None if the save failed."""
    signals.saved()
    saved = f"saved {path}" if path else "the last save failed, so the run will resume from an older checkpoint"
    say(f"stopped at iteration {iteration}: {saved}; {signals.AGAIN}")


def say(text: str) -> None:
    """Print a line on stderr, from the first process only."""
    if ranks.rank() == 0:
        print(text, file=sys.stderr, flush=True)
