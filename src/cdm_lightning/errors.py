class UserError(Exception):
    """A mistake of the user, told in one line: what is wrong, where, and how to mend it."""
