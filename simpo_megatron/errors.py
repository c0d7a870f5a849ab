"""The one exception for a mistake that the user can fix. Programs show its text without a traceback."""


class UserError(Exception):
    """A flag, file or row is wrong.

    The message is one sentence without a full stop: what is wrong, where, its value, and what to do. Programs print it
    and exit with code 2 (`program.exit_code`).
    """
