"""Shows the time that long work has left: in a bar on a terminal, else in a line for every tenth of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


def with_time_left(parts: Sequence[T], title: str, shown: bool = True) -> Iterator[T]:
    """The same parts.

    Args:
        parts: of the work; each takes about as long.
        title: what is done.
        shown: False: nothing is shown (on ranks other than 0).
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, started = Console(stderr=True), time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    tenth = -(-len(parts) // 10)
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        for number, part in enumerate(bar.track(parts, description=title), start=1):
            yield part
            if shown and not console.is_terminal and number % tenth == 0:
                left = timedelta(seconds=round((time.monotonic() - started) / number * (len(parts) - number)))
                print(f"{title}: {number} of {len(parts)} batches, {left} left", file=sys.stderr, flush=True)
