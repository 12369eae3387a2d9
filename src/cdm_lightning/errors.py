"""How a run ends early: by a mistake of the user, or because it was asked to stop."""


class UserError(Exception):
    """A mistake of the user, told in one line: what is wrong, where, and how to mend it."""


class Preempted(Exception):
    """A signal asked the run to stop, and it did, between two iterations; the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
