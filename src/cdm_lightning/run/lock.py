"""A lock on the folder of a run, because a second start would delete what the first one is writing."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from cdm_lightning.config import process_number
from cdm_lightning.errors import UserError
from cdm_lightning.files import locked
from cdm_lightning.run.folder import Run

LOCK = ".lock"


@contextmanager
def only_process_in(run: Run) -> Generator[None]:
    """Hold the lock of the run's folder inside the block; raise `UserError` if a process of another start holds it.

    Only the first process of a run takes the lock, on behalf of all its processes.
    """
    with ExitStack() as held:
        if not process_number():
            try:
                held.enter_context(locked(run.folder / LOCK))
            except BlockingIOError as error:
                raise UserError(
                    f"{run.folder}: another training process uses this folder ({error.strerror}); wait for it, stop it, "
                    "or set another run_name"
                ) from error
            except OSError as error:
                raise UserError(f"{run.folder}: cannot be written ({error.strerror}); set another run_name") from error
        yield
