"""The error a user can put right."""


class InputError(ValueError):
    """Something the user can put right: the command line prints it without a traceback and exits with 2."""

    told = False  # whether the user has got the message
