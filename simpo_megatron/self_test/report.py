"""What rank 0 prints: a line for each row while it runs, and the table; and the report as JSON and as rows of a CSV."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from simpo_megatron.self_test.environment import variables, versions
from simpo_megatron.self_test.rows import RESULTS, Bench, Row
from simpo_megatron.self_test.run import Found, Journal

COLOURS = {"proved": "green", "slow": "yellow", "FAILED": "bold red", "not here": "dim"}


def console() -> Console:
    """The terminal, or a file without line breaks of rich's own."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)


def printing_journal(bench: Bench, rows: Sequence[Row]) -> Journal:
    """A journal that prints each row and, at the end, the table; on ranks other than 0 it prints nothing."""
    if bench.rank:
        return Journal()
    out, total, numbers = console(), len(rows), iter(range(1, len(rows) + 1))

    def started(row: Row) -> None:
        out.print(f"{row.name} ...", markup=False)

    def ended(found: Found) -> None:
        outcome = found.outcome
        out.print(
            f"[{next(numbers)}/{total}] {found.name}: {outcome.result}; {outcome.figure} ({found.seconds:.1f} s)",
            markup=False,
        )

    return Journal(started=started if out.is_terminal else lambda row: None, ended=ended, finish=_table(out, total))


def _table(out: Console, total: int) -> Callable[[list[Found]], None]:
    def show(found: list[Found]) -> None:
        table = Table("row", "result", "figure", "what to do")
        for row in found:
            outcome = row.outcome
            colour = COLOURS[outcome.result]
            cells = (row.name, outcome.figure, outcome.advice)
            name, figure, advice = (cell.replace("[", "\\[") for cell in cells)
            table.add_row(name, f"[{colour}]{outcome.result}[/]", figure, advice)
        out.print(table)
        out.print(summary(found) + ("" if len(found) == total else f"; {total - len(found)} rows did not run"))

    return show


def summary(found: Sequence[Found]) -> str:
    """One line: how many rows came to which result."""
    counts = Counter(row.outcome.result for row in found)
    return ", ".join(f"{result} {counts[result]}" for result in reversed(RESULTS) if counts[result])


def has_failed(found: Sequence[Found]) -> bool:
    """Whether a row failed."""
    return any(row.outcome.result == "FAILED" for row in found)


def as_json(found: Sequence[Found], bench: Bench, machine: str) -> dict[str, Any]:
    """The report.

    Args:
        found: of the rows.
        bench: where they ran.
        machine: the name of the device.
    """
    return {
        "passed": not has_failed(found),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "device": bench.device,
        "processes": bench.processes,
        "implementations": bench.implementations,
        "versions": versions(),
        "variables": variables(),
        "rows": [{"name": row.name, **vars(row.outcome), "seconds": round(row.seconds, 3)} for row in found],
    }


def as_csv_rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """One row a measured number: the row of the table, its result, the measure and its value."""
    return [
        {"row": row.name, "result": row.outcome.result, "measure": measure, "value": f"{value:.6g}"}
        for row in found
        for measure, value in row.outcome.measured.items()
    ]


def device_name(bench: Bench, processor: str) -> str:
    """The name of the GPU, or of the processor."""
    return torch.cuda.get_device_name() if bench.on_gpu else processor
