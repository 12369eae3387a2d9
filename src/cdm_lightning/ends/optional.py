"""Files that a run can do without, such as logs and pictures: if one cannot be written, the run warns and continues."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cdm_lightning.files import disk_error

_failing: set[str] = set()


@contextmanager
def may_fail(what: str | Path, *also: type[Exception], proves: bool = True) -> Generator[None]:
    """Turn a disk error inside the `with` block into a warning on stderr, after which the run continues.

    The warning says that `what`, a path or a description, could not be written. Errors of the classes in `also`
    are treated like disk errors; other errors are raised. After a warning, further failures for the same `what` print
    nothing. The next block that succeeds for this `what` prints that it can be written again. Pass `proves=False` if
    the block only fills a buffer: its success then prints nothing, because it does not show that the disk works.
    """
    name = str(what)
    try:
        yield
    except Exception as error:
        cause = disk_error(error)
        if cause is None and not isinstance(error, also):
            raise
        if name not in _failing:
            _failing.add(name)
            _say(f"WARNING: {name} could not be written ({_reason(cause or error)}); the run continues")
    else:
        if proves and name in _failing:
            _failing.discard(name)
            _say(f"{name} can be written again")


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
