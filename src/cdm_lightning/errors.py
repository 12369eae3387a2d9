"""The two ways in which a run ends early: through a mistake of the user, or because it was asked to stop."""

FROM_WORKER = "Caught UserError in DataLoader worker"


class UserError(Exception):
    """A mistake of the user, explained in one line: what is wrong, where it is, and how to fix it.

    A `DataLoader` raises the error of a worker again, with the worker's whole traceback as its text; the message is then
    the last line of this text.
    """

    def __init__(self, message: str) -> None:
        if message.startswith(FROM_WORKER):
            message = message.rpartition(f"{__name__}.UserError: ")[2].strip()
        super().__init__(message)


class Preempted(SystemExit):
    """A run that a signal has stopped; everything is saved, and running the same command again continues it.

    It is a `SystemExit`, because code that catches every `Exception` must not keep a run from stopping.
    """

    exit_code = 75  # EX_TEMPFAIL in sysexits.h, which means: try again later

    def __init__(self, where: str = "") -> None:
        super().__init__(self.exit_code)
        self.where = where
