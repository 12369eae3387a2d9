"""How a run ends early: by a mistake of the user, or because it was asked to stop."""

FROM_WORKER = "Caught UserError in DataLoader worker"


class UserError(Exception):
    """A mistake of the user, told in one line: what is wrong, where, and how to mend it.

    A `DataLoader` makes it anew with the whole trace of its worker as text; the line at the end of it is the message then.
    """

    def __init__(self, message: str) -> None:
        if message.startswith(FROM_WORKER):
            message = message.rpartition(f"{__name__}.UserError: ")[2].strip()
        super().__init__(message)


class Preempted(Exception):
    """A signal asked the run to stop, and it did, between two iterations; the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
