"""Run a validation that a stopped run did not finish, so that the resumed run has the figures of all validations."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import lightning as L

from cdm_lightning.checkpoint.best import last_validation
from cdm_lightning.checkpoint.stored import FINITE, StoredCheckpoint
from cdm_lightning.distributed import ranks

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


def is_due(trainer: L.Trainer, start: StoredCheckpoint) -> bool:
    """Return whether a validation was due at the iteration of `start` but was not finished. All processes get the same answer.

    Returns False for checkpoints of older versions, which did not record finished validations.
    """
    interval = trainer.val_check_interval
    if not trainer.enable_validation or not isinstance(interval, int) or not start.record.get(FINITE):
        return False
    is_time = start.iteration > 0 and start.iteration % interval == 0
    return is_time and ranks.from_first(last_validation(start.path.parent) < start.iteration)


def make_up_validation(
    trainer: L.Trainer, module: "CDMModule", start: StoredCheckpoint, say: Callable[[str], None]
) -> None:
    """Run the validation at the iteration of `start` if it was due but not finished.

    A checkpoint is written before the validation of its iteration. A run that is killed in between therefore misses the
    validation. It is run as during training, by Lightning's validation loop. `say` is called with a line for the user.
    """
    if not is_due(trainer, start):
        return
    say(f"the validation of iteration {start.iteration} was not finished; it runs now")
    loop, first = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector._first_loop_iter
    progress = loop.batch_progress.state_dict()
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first
    loop.batch_progress.load_state_dict(progress)  # Lightning counts this validation when it goes on
    loop.restarting = True
