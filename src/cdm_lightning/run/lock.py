"""A lock on the folders that a run writes, so that two training processes never write the same folder."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cdm_lightning.config import process_number
from cdm_lightning.errors import UserError
from cdm_lightning.files import locked

LOCK = ".lock"


@contextmanager
def only_process_in(*folders: Path) -> Generator[None]:
    """Lock `folders` during the `with` block, so that no other run writes them.

    `folders` are the run's folder and its checkpoint folder, which may lie outside the run's folder. Missing folders
    are created. If a run has several processes, only the first one takes the locks.

    Raises `UserError` if another run has locked one of the folders, or if a folder cannot be created.
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
