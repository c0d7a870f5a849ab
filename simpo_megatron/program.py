"""How every program of this package ends: exit code 0, or 2 and one sentence for a mistake that the user can mend."""

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
    """argparse, with mistakes as `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def check_report(flag: str, file: Path) -> None:
    """Makes sure before the work that its report can be written; an empty file is there afterwards.

    Raises:
        UserError: it cannot.
    """
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise UserError(f"{flag} {file} cannot be written: {error.strerror}; give a file that can") from error


def exit_code(program: str, action: Callable[[], int | None]) -> int:
    """Runs `action`; returns what it returns (0 for None), 2 after printing its UserError, or 130 where it is interrupted."""
    try:
        return action() or 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) != 0:
            # Every rank meets the same error. torchrun stops all ranks when one exits, so the others leave rank 0 the
            # time to say it. Who is still alive after that met something of its own, and says so.
            time.sleep(20)
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        return 130
