"""What the benchmarks share: the name of the machine, its clocks, and the CSV files with their results."""

from __future__ import annotations

import csv
import os
import platform
import time
from pathlib import Path
from typing import Any


def processor() -> str:
    """The name of the CPU and how many cores there are."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()} x {os.cpu_count()}"


def clocks() -> tuple[float, float]:
    """Now: the clock, and the CPU time of all threads of this process, which a busy machine changes less."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> list[float]:
    """Seconds by both clocks."""
    return [now - then for now, then in zip(clocks(), started, strict=True)]


def append_rows(path: Path, rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """Appends rows to a CSV file. A new file gets a header.

    Args:
        path: of the file.
        rows: by column, all with the same columns.
        where: machine, versions and settings; the first columns of every row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*where, *rows[0]], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**where, **row} for row in rows)
