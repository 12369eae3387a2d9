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
    `begin_with`, a checkpoint of another run, or None. All checkpoints in `folder` that are newer than the result are
    damaged, and they are renamed to unused_NAME. Folders whose names do not fit the iteration in their state.json are
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
    named: dict[Path, Path] = {}  # the right name of each iteration's checkpoint, and where it is
    right = {path: folder / NAME.format(recorded_iteration(path)) for path in checkpoints_in(folder)}
    for path in sorted(right, key=lambda path: (path != chosen, path != right[path])):
        if right[path] in named:
            say(
                f"renamed: {set_aside(path)} (the checkpoint of iteration {iteration_of(right[path])} is another folder)"
            )
        else:
            named[right[path]] = path
    return _renamed({name: path for name, path in named.items() if name != path}, chosen, say)


def _renamed(pending: dict[Path, Path], chosen: Path, say: Callable[[str], None]) -> Path:
    """Give each checkpoint in `pending`, {right name: present path}, its right name. Return the new path of `chosen`.

    Names may be exchanged among the checkpoints, so a name is only given once its present owner has left it. After a kill, the
    records still say which checkpoint is which.
    """
    while pending:
        name = next((name for name in pending if name not in pending.values()), None)
        if name is None:  # each waits for another one: the first moves to a name that nobody has
            waiting = next(iter(pending))
            highest = max(map(iteration_of, checkpoints_in(chosen.parent)))
            path, target = pending[waiting], chosen.parent / NAME.format(highest + 1)
            pending[waiting] = target
        else:
            path, target = pending.pop(name), name
            say(f"renamed: {path} to {target.name}, since it holds that iteration")
        rename(path, target)
        chosen = target if path == chosen else chosen
    return chosen
