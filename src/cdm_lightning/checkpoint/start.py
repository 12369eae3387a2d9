"""Choose the checkpoint from which a run resumes: its newest undamaged one.

"Newest" means the highest iteration in state.json.
"""

from collections.abc import Callable
from pathlib import Path

from cdm_lightning.checkpoint.folder import NAME, checkpoints_in, iteration_of, rename, set_aside
from cdm_lightning.checkpoint.stored import (
    StoredCheckpoint,
    newest_checkpoint,
    read_checkpoint,
    recorded_iteration,
    require_good,
)
from cdm_lightning.distributed import ranks
from cdm_lightning.errors import UserError


def choose_start(
    folder: Path, begin_with: Path | None, fingerprint: str, say: Callable[[str], None]
) -> StoredCheckpoint | None:
    """Return the checkpoint from which a run resumes, or None for a fresh start.

    The result is the newest undamaged checkpoint in `folder`. If `folder` has no checkpoint, the result is
    `begin_with`, a checkpoint of another run, or None. Checkpoints in `folder` that are newer than the result, which
    are all damaged, are renamed to unused_NAME. Folders whose names do not fit the iteration in their state.json are
    renamed to fit. `say` is called with each message for the user. Raises `UserError` if all checkpoints in `folder`
    are damaged, if `begin_with` is damaged, or if the `Backbone.fingerprint` that the result stores is not
    `fingerprint`.
    """
    start = newest_checkpoint(folder, lambda path, why: say(f"skipped a checkpoint: {why}"))
    if start is not None:
        start = in_order(start, say)
    elif begin_with is not None:
        start = require_good(read_checkpoint(begin_with))
    if start is None:
        return None
    start = read_checkpoint(start.path, fingerprint)
    _ = start.sizes, start.trainer_state()  # refuses a file that is no checkpoint before any network is built
    say(f"resuming from {start.path} (iteration {start.iteration})")
    return start


def in_order(start: StoredCheckpoint, say: Callable[[str], None]) -> StoredCheckpoint:
    """Rename checkpoints so that `start` is the newest in its folder. Return `start`, opened again.

    Checkpoints of later iterations are renamed to unused_NAME. A checkpoint whose name does not fit the iteration in
    its state.json gets the name that fits. `say` is called with a line about each change. Only the first process
    renames, but all processes must call this. Raises `UserError` if a folder cannot be renamed.
    """
    path, error = start.path, None
    if ranks.rank() == 0:
        try:
            path = _put_in_order(start, say)
        except OSError as caught:
            error = caught
    try:
        ranks.agree(error)
    except OSError as caught:
        raise UserError(
            f"{start.path.parent}: a checkpoint cannot be renamed ({caught.strerror or caught}); make the folder writable"
        ) from caught
    return read_checkpoint(ranks.from_first(path))


def _put_in_order(start: StoredCheckpoint, say: Callable[[str], None]) -> Path:
    folder, chosen = start.path.parent, start.path
    for path in checkpoints_in(folder):
        if path != chosen and recorded_iteration(path) > start.iteration:
            say(f"renamed: {set_aside(path)} (it can be deleted)")
    wrong = [path for path in checkpoints_in(folder) if iteration_of(path) != recorded_iteration(path)]
    for path in sorted(wrong, key=lambda path: path != chosen):  # the chosen one first
        named = folder / NAME.format(recorded_iteration(path))
        if named.exists() and path != chosen:  # a copy of another checkpoint
            say(f"renamed: {set_aside(path)} (a copy of {named.name}; it can be deleted)")
            continue
        if named.exists():
            say(f"renamed: {set_aside(named)} (it can be deleted)")
        say(f"renamed: {path} to {named.name}, since it holds that iteration")
        rename(path, named)
        chosen = named if path == chosen else chosen
    return chosen
