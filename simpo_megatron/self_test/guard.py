"""Ends the program where the main thread is stuck: in a collective whose ranks are gone, or on the device.

with Guard(Limits(...), crashed=ranks.crash, end=give_up):
    ...                    # `end(reason)` is called from a thread if the block takes too long
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple


class Limits(NamedTuple):
    """Seconds.

    Attributes:
        row: that a row may take.
        after_crash: that the other ranks have after a rank has raised. Over gloo their collectives raise and
            they go on. Over NCCL they hang, and torch ends the process without a word.
        poll: between two looks.
    """

    row: float
    after_crash: float
    poll: float = 1.0


class Guard:
    """Watches a block from a thread.

    Args:
        limits: of the block.
        crashed: the error of a rank that has raised, or None; called from the thread.
        end: ends the program; its argument says why.
    """

    def __init__(self, limits: Limits, crashed: Callable[[], str | None], end: Callable[[str], None]) -> None:
        self.limits, self.crashed, self.end = limits, crashed, end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        end, reason = time.monotonic() + self.limits.row, f"no end after {self.limits.row:.0f} s"
        known = False
        while not self._done.wait(self.limits.poll):
            now = time.monotonic()
            if not known and (text := self.crashed()):
                known, reason = True, text
                end = min(end, now + self.limits.after_crash)
            if now > end:
                self.end(reason)
                return
