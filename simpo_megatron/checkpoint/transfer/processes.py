"""Runs the units of a plan, here or in several processes. They import no torch, so each costs little more than its buffers."""

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

from simpo_megatron.checkpoint.transfer.execute import Outcome, Report, read_unit, write_unit
from simpo_megatron.checkpoint.transfer.moves import Unit
from simpo_megatron.errors import UserError

_moved: Any = None  # bytes that all workers have moved, shared


def _start(moved: Any, parent: int) -> None:
    global _moved
    _moved = moved
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed has nobody to report to, and would keep its files locked."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(unit: Unit, folder: Path | None) -> Outcome:
    def report(size: int) -> None:
        with _moved.get_lock():
            _moved.value += size

    return write_unit(unit, folder, report) if folder else read_unit(unit, report)


def _run_in_processes(units: Sequence[Unit], folder: Path | None, workers: int, report: Report) -> list[Outcome]:
    """Runs units in `workers` processes, in the order given; outcomes in that order.

    Raises:
        UserError: what a worker raised first, or a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    moved, seen = context.Value("Q", 0), 0
    with ProcessPoolExecutor(min(workers, len(units)), context, _start, (moved, os.getpid())) as executor:
        futures = [executor.submit(_run, unit, folder) for unit in units]
        running = set(futures)
        try:
            while running:
                done, running = wait(running, timeout=0.2)
                now = moved.value  # type: ignore[attr-defined]
                report(now - seen)
                seen = now
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); go on with --resume") from None
        finally:
            executor.shutdown(cancel_futures=True)


def run_units(units: Sequence[Unit], folder: Path | None, workers: int, report: Report) -> list[Outcome]:
    """Runs units here or in `workers` processes; writes where there is a folder, else reads.

    Raises:
        UserError: as `write_unit`, or a worker was killed.
    """
    if workers == 1 or len(units) < 2:
        return [write_unit(unit, folder, report) if folder else read_unit(unit, report) for unit in units]
    return _run_in_processes(units, folder, workers, report)
