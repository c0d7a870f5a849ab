"""The one exception for a mistake that the user can fix. Programs show its text without a traceback."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator


class UserError(Exception):
    """A flag, file or row is wrong.

    The message is one sentence without a full stop: what is wrong, where, its value, and what to do. Programs print it
    and exit with code 2 (`program.exit_code`).

    Attributes:
        on_all_ranks: whether every rank raises this one, so that rank 0 alone prints it.
    """

    on_all_ranks = False


@contextlib.contextmanager
def same_on_all_ranks() -> Iterator[None]:
    """Marks an error of the block as `on_all_ranks`: the block does the same on each, unless a file cannot be read."""
    try:
        yield
    except UserError as error:
        error.on_all_ranks = not isinstance(error.__context__, OSError)
        raise


def one_line(error: BaseException) -> str:
    """The text of an error of another package in one line; for an assertion without text, the code that failed."""
    if text := " ".join(str(error).split()):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].line if frames else None) or type(error).__name__
