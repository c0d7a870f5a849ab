"""The one exception for a mistake the user can mend: its text is a whole sentence, shown without a traceback."""


class UserError(Exception):
    """Bad input: a flag, file or row. The message names it, its value and the mend; programs print it and exit with 2."""
