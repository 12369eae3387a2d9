"""The two exceptions that end a run early: a mistake of the user, and a signal that stops the run."""

FROM_WORKER = "Caught UserError in DataLoader worker"


class UserError(Exception):
    """A mistake of the user. Its text is one line: what is wrong, where it is, and how to fix it.

    If a `DataLoader` raises the error of a worker process again, it puts the worker's traceback before the message. The
    constructor removes this traceback.
    """

    def __init__(self, message: str) -> None:
        if message.startswith(FROM_WORKER):
            message = message.rpartition(f"{__name__}.UserError: ")[2].strip()
        super().__init__(message)


class Preempted(SystemExit):
    """Ends a run that was stopped by a signal; the process exits with code 75.

    The user continues the run by the same command. `where` says at which point the run stopped, such as "in training". The class
    is a `SystemExit`, so that code that catches every `Exception` does not catch it and keep the run alive.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later

    def __init__(self, where: str = "") -> None:
        super().__init__(self.exit_code)
        self.where = where
