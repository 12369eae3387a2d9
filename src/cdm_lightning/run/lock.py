"""A lock on the folders that a run writes, because a second start would delete what the first one is writing."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cdm_lightning.config import process_number
from cdm_lightning.errors import UserError
from cdm_lightning.files import locked

LOCK = ".lock"


@contextmanager
def only_process_in(*folders: Path) -> Generator[None]:
    """Lock these folders inside the block; raise `UserError` if another training process has locked one, or one cannot be made.

    `folders` are the run's folder and that of its checkpoints, which may lie elsewhere; each is made if it is missing. Only the
    first process of a run takes the locks, for all its processes.
    """
    with ExitStack() as held:
        for folder in {folder.resolve(): folder for folder in folders}.values() if not process_number() else ():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder / LOCK))
            except BlockingIOError as error:
                raise UserError(
                    f"{folder}: another training process uses this folder ({error.strerror}); wait for it, stop it, "
                    "or set another run_name"
                ) from error
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror}); set another run_name") from error
        yield
