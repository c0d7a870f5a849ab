"""What all command-line programs of this package share: the parser, and the exit codes.

0: success. 1: the program ran, and what it checked is wrong (programs that check). 2: a mistake that the user can fix;
one line names it. 130: interrupted from the keyboard.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from simpo_megatron.disk import FULL, cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line raises `UserError` instead of leaving the program."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError; argparse calls it."""
        raise UserError(f"{message}; --help lists the flags")


def check_report(flag: str, file: Path) -> None:
    """Checks before the work starts that a report can be written. Nothing is left behind.

    Args:
        flag: that names the file, for the error.
        file: the report.

    Raises:
        UserError: the file cannot be written.
    """
    there = file.exists()
    try:
        with file.open("a"):
            pass
        if not there:
            file.unlink()
    except OSError as error:
        raise cannot_write(f"{flag} {file}", error, "give another file") from error


def write_report(flag: str, file: Path, text: str) -> None:
    """Writes a report whole or not at all; into a pipe or a device, as it comes.

    Args:
        flag: that names the file, for the error.
        file: the report.
        text: its content.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if file.exists() and not file.is_file():
            file.write_text(text, encoding="utf-8")
        else:
            atomic_write(file.resolve(), text)
    except OSError as error:
        raise cannot_write(f"{flag} {file}", error, "give another file") from error


def exit_code(program: str, action: Callable[[], int | None]) -> int:
    """Runs a program and turns its outcome into an exit code.

    Args:
        program: its name, which begins the line of an error.
        action: the program. It returns its exit code, or None for 0.

    Returns:
        What `action` returns, 2 if it raises UserError (printed to stderr) or meets a full or read-only disk, or 130 if
        it is interrupted.
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
    except OSError as error:
        if error.errno not in (*FULL, errno.EROFS):
            raise
        what = error.filename or "a file"
        print(f"{program}: {cannot_write(what, error, 'write to another disk')}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        return 130
