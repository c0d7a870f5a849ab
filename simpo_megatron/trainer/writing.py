"""The processes that write a checkpoint. None of them stays when its rank has gone, also after kill -9.

Megatron forks a writer from each rank. The writers report to their rank through a server, a process that it starts
once. Megatron's own server would wait for ever for a rank that was killed, and would keep its output open: what reads
that output, such as a pipe or a launcher, would wait as well.

The server imports this module, so it imports Megatron only where it is used.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any


def start_server() -> None:
    """Starts the server of this rank, if it has none: Megatron uses it for all checkpoints of this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        server = SyncManager(ctx=multiprocessing.get_context("spawn"))
        server.start(initializer=_end_with_parent)
        filesystem_async._results_queue = server.Queue()


def _end_with_parent() -> None:
    """Runs in the server: a thread ends it when the rank and the writers that were forked from it have ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def undisturbed(write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Runs in a writer: writes, and leaves signals to the trainer.

    A scheduler sends a signal to all processes of a job. The trainer then finishes its checkpoint, for which the writer
    must live on.

    Args:
        write: Megatron's function.
        args: of it.
        kwargs: of it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    write(*args, **kwargs)
