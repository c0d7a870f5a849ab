"""Progress of long work on rows: a bar with tokens/s and the time that is left, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Meter:
    """Counts rows and tokens, and shows them.

    Attributes:
        tokens: counted so far.
    """

    def __init__(self, title: str, total: int, bar: Progress) -> None:
        self._title, self._total, self._bar = title, total, bar
        self._task = bar.add_task(title, total=total, speed="")
        self._started, self._rows, self.tokens = time.monotonic(), 0, 0

    def add(self, rows: int, tokens: int) -> None:
        """Counts finished rows and their tokens."""
        tenth = -(-self._total // 10)
        crossed = (self._rows + rows) // tenth > self._rows // tenth
        self._rows, self.tokens = self._rows + rows, self.tokens + tokens
        self._bar.update(self._task, advance=rows, speed=f"{self.tokens_per_second:,.0f} tokens/s")
        if self._bar.disable and crossed:
            seconds = time.monotonic() - self._started
            left = timedelta(seconds=round(seconds / self._rows * (self._total - self._rows)))
            print(
                f"{self._title}: {self._rows} of {self._total}, {self.tokens_per_second:,.0f} tokens/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    @property
    def tokens_per_second(self) -> float:
        """Since the start."""
        return self.tokens / max(time.monotonic() - self._started, 1e-9)


@contextmanager
def meter(title: str, total: int) -> Iterator[Meter]:
    """Shows progress inside the block.

    Args:
        title: what is done.
        total: number of rows.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield Meter(title, total, bar)
