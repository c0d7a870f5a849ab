"""How long responses are, before and after training: tokens, characters, and the share that was cut.

    python tools/response_lengths.py before.jsonl after.jsonl [--json FILE]

The files are those of tools/generate_responses.py or tools/score_responses.py; there may be one or more. The last line
of the table is the last file less the first. Tokens are those of each file's own tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from simpo_megatron.on_policy.lengths import LengthReport
from simpo_megatron.on_policy.scoring import read_responses
from simpo_megatron.program import Parser, check_report, exit_code, write_report
from simpo_megatron.settings import path_value, source_value


def run(args: argparse.Namespace) -> None:
    """Prints the table, and writes it as JSON where that is wanted."""
    if args.json:
        check_report("--json", args.json, [Path(file) for file in args.responses])
    rows, prompts = [], []
    for file in args.responses:
        ids: set[str] = set()
        report = LengthReport.of(_counted(file, ids))
        prompts.append(ids)
        rows.append({"file": file, "prompts": len(ids), **report.summary()})
    first, last = rows[0], rows[-1]
    numbers = [name for name in first if name != "file" and None not in (first[name], last[name])]
    change = {name: last[name] - first[name] for name in numbers} if len(rows) > 1 else {}
    _show(rows, change)
    if any(ids != prompts[0] for ids in prompts):
        print("The files answer different prompts, so a part of the change may come from the prompts.")
    if args.json:
        write_report("--json", args.json, json.dumps({"files": rows, "change": change}, indent=1) + "\n")


def _counted(file: str, ids: set[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file, whose ids are added to the set."""
    for _, row in read_responses(file):
        ids.add(row["id"])
        yield row


def _show(rows: Sequence[dict[str, Any]], change: dict[str, float]) -> None:
    table = Table(*rows[0], title="responses")
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(*(_shown(name, value) for name, value in row.items()))
    if change:
        table.add_row("change", *(_shown(name, change.get(name), "+") for name in rows[0] if name != "file"))
    Console(highlight=False).print(table)


def _shown(name: str, value: Any, sign: str = "") -> str:
    """A cell; `sign` "+" writes the sign of a positive number too."""
    if value is None:
        return "not known"
    if isinstance(value, str):
        return value
    return format(
        value, f"{sign}.1%" if name == "truncated" else f"{sign},.1f" if isinstance(value, float) else f"{sign},"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser("response_lengths.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("responses", nargs="+", type=source_value, metavar="FILE", help="rows with `responses`")
    parser.add_argument("--json", type=path_value, metavar="FILE", help="write the numbers there")
    return exit_code("response_lengths.py", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
