"""Check callbacks and loggers of other libraries before training, and turn their errors into messages for the user.

The messages name the callback or logger by its option, such as "callbacks.early_stopping".
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from traceback import walk_tb

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger

from cdm_lightning.checkpoint.best import is_logged
from cdm_lightning.config import one_line
from cdm_lightning.errors import UserError

OWN = "cdm_lightning."
LIBRARIES = ("lightning", "pytorch_lightning")
OF_TRAINING = ("throughput",)  # the first part of the names of figures of training, in addition to the trained networks


def named_parts(config: Mapping, key: str) -> list[str]:
    """Return the dotted names, such as "callbacks.ladder", of the objects that `build(config, key)` returns as a list."""
    return [f"{key}.{name}" for name, child in (config.get(key) or {}).items() if child is not None]


def all_known(callbacks: Iterable[L.Callback]) -> bool:
    """Return whether all callbacks come from this package or Lightning.

    For callbacks of other libraries, it is not known which figures they log.
    """
    return all(type(callback).__module__.partition(".")[0] in (*LIBRARIES, "cdm_lightning") for callback in callbacks)


def check_monitors(callbacks: Mapping[str, L.Callback], logged: Collection[str], roles: Collection[str]) -> None:
    """Raise `UserError` if the attribute `monitor` of a callback names a figure that is never logged.

    The keys of `callbacks` are options such as "callbacks.early_stopping". `logged` holds the names of the figures that
    validation logs. `roles` holds the names of the trained networks. Figures of training are accepted too: those that
    begin with a network's name, such as "student/loss", those that begin with "throughput/", and "step".
    """
    for option, callback in callbacks.items():
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str):
            continue
        first, slash, _ = monitor.partition("/")
        of_training = (bool(slash) and first in (*roles, *OF_TRAINING)) or monitor == "step"
        if not of_training and not (first == "val" and is_logged(monitor, logged)):
            known = ", ".join(sorted(logged)) or "none is logged"
            raise UserError(
                f"{option}.monitor={monitor} is never logged; set it to a figure of validation ({known}) or of "
                f"training, such as {next(iter(roles))}/loss"
            )


def open_loggers(loggers: Mapping[str, Logger]) -> None:
    """Open the files or connections of all loggers before training.

    The keys of `loggers` are options such as "logger.csv". Raises `UserError` for a logger that cannot be opened, and
    for one whose folder lies outside its `save_dir`. If the disk fails, a `GuardedLogger` warns and raises no error, as
    it does in training.
    """
    for option, logger in loggers.items():
        inner: Logger = getattr(logger, "inner", logger)  # of a `GuardedLogger`
        name = type(inner).__name__
        try:
            root = inner.save_dir
            for folder in (inner.root_dir, inner.log_dir):
                if root and folder and not Path(folder).resolve().is_relative_to(Path(root).resolve()):
                    raise UserError(
                        f"{option}: {name} would write into {folder}, outside its save_dir={root}; set "
                        f"{option}.name and {option}.version to relative paths without .."
                    )
            _ = getattr(logger, "experiment", None)
        except (UserError, OSError):
            raise
        except Exception as error:
            raise UserError(
                f"{option}: {name} cannot be set up ({type(error).__name__}: {one_line(error)}); change its options "
                f"{option}.*, or choose another logger"
            ) from error


def failure_of(error: Exception, callbacks: Mapping[str, L.Callback]) -> UserError | None:
    """Return a `UserError` if the user's configuration has caused `error`, or None if `error` may be a bug.

    The configuration is taken as the cause if `error` is a `MisconfigurationException` of Lightning. It is also taken
    as the cause if `error` was raised while one of Lightning's own callbacks in `callbacks` ran, unless code of this
    package raised it. The keys of `callbacks` are options such as "callbacks.early_stopping". The `UserError` names the
    option of the callback that ran when `error` was raised. If no callback ran, it names the trainer.
    """
    misconfigured = isinstance(error, MisconfigurationException)
    inside = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    last = type(inside[-1]).__module__ if inside and inside[-1] is not None else ""
    for option, callback in callbacks.items():
        library = type(callback).__module__.partition(".")[0] in LIBRARIES
        if any(one is callback for one in inside) and (misconfigured or (library and not last.startswith(OWN))):
            name = type(callback).__name__
            return UserError(
                f"{option}: {name} cannot be used here ({one_line(error)}); change its options {option}.* or remove it"
            )
    return UserError(f"trainer: {one_line(error)}") if misconfigured else None
