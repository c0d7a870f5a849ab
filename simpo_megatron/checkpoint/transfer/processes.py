"""Runs the units of a plan, in this process or in several.

Worker processes import this module and no torch, so each costs little more than its buffers.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.transfer.execute import Outcome, ProgressCallback, read_unit, write_unit
from simpo_megatron.checkpoint.transfer.moves import Unit
from simpo_megatron.errors import UserError

_moved: Any = None  # in a worker: bytes that all workers have moved, shared with the parent


def run_units(units: Sequence[Unit], folder: Path | None, workers: int, label: str) -> list[Outcome]:
    """Runs units and shows a progress bar. Every conversion and every verification goes through it.

    Args:
        units: to run.
        folder: to write to, with `data` and `journal`; None to read and hash alone.
        workers: processes.
        label: of the progress bar.

    Returns:
        The outcomes in the order of `units`.

    Raises:
        UserError: as `write_unit` and `read_unit`, or a worker was killed.
    """
    from simpo_megatron.checkpoint.transfer.progress import transfer_bar  # here: workers need not import rich

    with transfer_bar(label, sum(unit.size for unit in units)) as progress:
        if workers == 1 or len(units) < 2:
            return [_run(unit, folder, progress) for unit in units]
        return _run_in_processes(units, folder, workers, progress)


def _run(unit: Unit, folder: Path | None, progress: ProgressCallback) -> Outcome:
    return write_unit(unit, folder, progress) if folder else read_unit(unit, progress)


def _run_in_worker(unit: Unit, folder: Path | None) -> Outcome:
    def progress(size: int) -> None:
        with _moved.get_lock():
            _moved.value += size

    return _run(unit, folder, progress)


def _start(moved: Any, parent: int) -> None:
    """Prepares a worker."""
    global _moved
    _moved = moved
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends a worker when its parent was killed: it would keep its files locked, and nobody would read its result."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_in_processes(
    units: Sequence[Unit], folder: Path | None, workers: int, progress: ProgressCallback
) -> list[Outcome]:
    context = multiprocessing.get_context("spawn")
    moved, seen = context.Value("Q", 0), 0
    with ProcessPoolExecutor(min(workers, len(units)), context, _start, (moved, os.getpid())) as executor:
        futures = [executor.submit(_run_in_worker, unit, folder) for unit in units]
        running = set(futures)
        try:
            while running:
                done, running = wait(running, timeout=0.2)
                now = moved.value  # type: ignore[attr-defined]
                progress(now - seen)
                seen = now
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); go on with --resume") from None
        finally:
            executor.shutdown(cancel_futures=True)
