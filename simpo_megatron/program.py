"""What all command-line programs of this package share: the parser, and the exit codes.

0: success. 1: the program ran, and what it checked is wrong (programs that check). 2: a mistake that the user can fix;
one line names it. 130: interrupted from the keyboard.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from simpo_megatron.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line raises `UserError` instead of leaving the program."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError; argparse calls it."""
        raise UserError(f"{message}; --help lists the flags")


def check_report(flag: str, file: Path) -> None:
    """Checks before the work starts that a report can be written. It creates the file if there is none.

    Args:
        flag: that names the file, for the error.
        file: the report.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise UserError(f"{flag} {file} cannot be written: {error.strerror}; give another file") from error


def exit_code(program: str, action: Callable[[], int | None]) -> int:
    """Runs a program and turns its outcome into an exit code.

    Args:
        program: its name, which begins the line of an error.
        action: the program. It returns its exit code, or None for 0.

    Returns:
        What `action` returns, 2 if it raises UserError (printed to stderr), or 130 if it is interrupted.
    """
    try:
        return action() or 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) != 0:
            # Usually every rank raises the same error, and rank 0 alone should print it. torchrun stops all ranks when
            # one exits, so the others wait. A rank that is still running after the wait has an error of its own: it
            # prints it.
            time.sleep(20)
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        return 130
