"""The two ways in which a run ends early: through a mistake of the user, or because it was asked to stop."""

FROM_WORKER = "Caught UserError in DataLoader worker"


class UserError(Exception):
    """A mistake of the user. `str()` of it is one line that says what is wrong, where it is, and how to fix it.

    A `DataLoader` raises the error of a worker process again, with the worker's traceback in front of the message; the
    traceback is cut off here, so that `str()` is the worker's message alone.
    """

    def __init__(self, message: str) -> None:
        if message.startswith(FROM_WORKER):
            message = message.rpartition(f"{__name__}.UserError: ")[2].strip()
        super().__init__(message)


class Preempted(SystemExit):
    """Raised to end a run that a signal has asked to stop: the process exits with code 75.

    Running the same command again continues the run. `where` says at which point it stopped, such as "in training". It is a
    `SystemExit`, because code that catches every `Exception` must not keep a run from stopping.
    """

    exit_code = 75  # EX_TEMPFAIL in sysexits.h, which means: try again later

    def __init__(self, where: str = "") -> None:
        super().__init__(self.exit_code)
        self.where = where
