"""What all command-line programs of this package share: the parser, reports, the time left, and the exit codes.

0: success. 1: the program ran, and what it checked is wrong (programs that check). 2: a mistake that the user can fix;
one line names it. 130: interrupted from the keyboard. 143: ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from simpo_megatron.disk import FULL, cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write

T = TypeVar("T")


def nearest(name: str, known: Collection[str], likeness: float = 0.7) -> str | None:
    """The name that a user probably meant; None if no name is near.

    Args:
        name: what the user wrote, as a field name: `train_dat` for `--train-dat`.
        known: the names that there are.
        likeness: the least ratio of `difflib` that counts as near; 1 is equal.
    """
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=likeness)), None)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line raises `UserError`, and an unknown flag is answered with the nearest one.

    Flags cannot be abbreviated.

    Args:
        args: of argparse.
        advise: what to tell the user of an unknown flag. It gets the flag as a field name and the names that there are,
            and returns None if it has no advice.
        options: of argparse.
    """

    def __init__(
        self, *args: Any, advise: Callable[[str, Collection[str]], str | None] | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._advise = advise

    def accept(self, old: str, new: str) -> None:
        """Accepts an old name of a flag; --help does not show it."""
        self._option_string_actions[old] = self._option_string_actions[new]

    def error(self, message: str) -> NoReturn:
        """Raises UserError; argparse calls it."""
        raise UserError(f"{message}; --help lists the flags")

    # typeshed describes the method by overloads; this is their common form.
    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """As in argparse, but it refuses an unknown flag first, before a flag that is missing."""
        for word in sys.argv[1:] if args is None else args:
            if word == "--":
                break
            name = word.partition("=")[0]
            # What argparse takes for a flag: no negative number, and no text with a blank.
            if re.match(r"--|-[A-Za-z]", name) and " " not in name and name not in self._option_string_actions:
                raise UserError(f"{name} is not a flag; {self._advice(name)}")
        return super().parse_known_args(args, namespace)

    def _advice(self, flag: str) -> str:
        shown = [text for action in self._actions for text in action.option_strings if text.startswith("--")]
        known = {text[2:].replace("-", "_"): text for text in shown}
        name = flag.lstrip("-").replace("-", "_")
        if self._advise is not None and (advice := self._advise(name, known)):
            return advice
        near = nearest(name, known)
        return f"did you mean {known[near]}?" if near else "--help lists the flags"


def check_report(flag: str, file: Path, inputs: Collection[Path]) -> None:
    """Checks before the work starts that a report can be written. Nothing is left behind.

    Args:
        flag: that names the file, for the error.
        file: the report.
        inputs: files and folders that the program reads.

    Raises:
        UserError: the file cannot be written, or is an input or in one.
    """
    for read in inputs:
        if file.resolve() == read.resolve() or (read.is_dir() and read.resolve() in file.resolve().parents):
            raise UserError(f"{flag} {file} would write over what is read from {read}; give another file")
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "", str(file))
        if file.exists() and not file.is_file():  # a pipe or a device: to open it may wait for a reader
            if not os.access(file, os.W_OK):
                raise PermissionError(errno.EACCES, "", str(file))
        else:
            # A file of its own name: the ranks of a program check the same report at once.
            with tempfile.NamedTemporaryFile(dir=file.resolve().parent, prefix=f".{file.name}."):
                pass
    except OSError as error:
        raise cannot_write(f"{flag} {file}", error, "give another file") from error


def write_report(flag: str, file: Path, content: str | bytes) -> None:
    """Writes a report whole or not at all; into a pipe or a device, as it comes.

    Args:
        flag: that names the file, for the error.
        file: the report.
        content: text or bytes.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if file.exists() and not file.is_file():
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            atomic_write(file.resolve(), content)
    except OSError as error:
        raise cannot_write(f"{flag} {file}", error, "give another file") from error


class Meter:
    """Counts the parts of a long work that are done; `meter` makes it.

    Attributes:
        tokens: counted so far.
    """

    def __init__(self, title: str, total: int, bar: Any, lines: bool) -> None:
        self._title, self._total, self._bar, self._lines = title, total, bar, lines
        self._task = bar.add_task(title, total=total, speed="")
        self._started, self._parts, self.tokens = time.monotonic(), 0, 0

    def add(self, parts: int, tokens: int = 0) -> None:
        """Counts finished parts, and their tokens where the work has some."""
        tenth = -(-self._total // 10)
        crossed = (self._parts + parts) // tenth > self._parts // tenth
        self._parts, self.tokens = self._parts + parts, self.tokens + tokens
        speed = f"{self.tokens_per_second:,.0f} tokens/s" if self.tokens else ""
        self._bar.update(self._task, advance=parts, speed=speed)
        if self._lines and crossed:
            seconds = time.monotonic() - self._started
            left = timedelta(seconds=round(seconds / self._parts * (self._total - self._parts)))
            said = [f"{self._title}: {self._parts} of {self._total}", *([speed] if speed else []), f"{left} left"]
            print(", ".join(said), file=sys.stderr, flush=True)

    @property
    def tokens_per_second(self) -> float:
        """Since the start."""
        return self.tokens / max(time.monotonic() - self._started, 1e-9)


@contextlib.contextmanager
def meter(title: str, total: int, shown: bool = True) -> Iterator[Meter]:
    """Shows the progress and the time that is left: in a bar on a terminal, else in a line for every tenth.

    Args:
        title: what is done.
        total: number of parts, each of which takes about as long.
        shown: False: nothing is shown (on ranks other than 0).
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as bar:
        yield Meter(title, total, bar, lines=shown and not console.is_terminal)


def with_time_left(parts: Sequence[T], title: str, shown: bool = True) -> Iterator[T]:
    """The same parts, with the progress that `meter` shows."""
    with meter(title, len(parts), shown) as done:
        for part in parts:
            yield part
            done.add(1)


class Terminated(SystemExit):
    """SIGTERM has arrived; its code is that of the program."""


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Inside the block, SIGTERM raises `Terminated`: locks and temporary files are removed as on any other way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        raise Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(program: str, action: Callable[[], int | None]) -> int:
    """Runs a program and turns its outcome into an exit code.

    Args:
        program: its name, which begins the line of an error.
        action: the program. It returns its exit code, or None for 0.

    Returns:
        What `action` returns, 2 if it raises UserError (printed to stderr) or meets a full or read-only disk, or 130 if
        it is interrupted. SIGTERM leaves it as `Terminated` with code 143.
    """
    try:
        with _sigterm_unwinds():
            return action() or 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) != 0:
            # Usually every rank raises the same error, and rank 0 alone should print it. torchrun stops all ranks when
            # one exits, so the others wait. A rank that is still running after the wait may have an error of its own:
            # it prints it, unless it knows that rank 0 has the same.
            time.sleep(20)
            if error.on_all_ranks:
                return 2
        # One line, whatever text of a row or of another package it quotes.
        print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
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


def leave(code: int) -> NoReturn:
    """Ends the process of a program that may have joined process groups.

    After an error the groups still have threads. A normal exit of Python now and then aborts in them: it prints
    "terminate called without an active exception", and the exit code is lost.

    Args:
        code: the exit code.
    """
    if code == 0:
        sys.exit()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
