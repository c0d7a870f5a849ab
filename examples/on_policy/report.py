"""The table and the plot of the on-policy example: every round, and the offline round, on the same held-out questions.

python examples/on_policy/report.py --rounds rounds.csv --offline scored.jsonl --pairs N --plot FILE
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path

from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from simpo_megatron.on_policy.lengths import LengthReport
from simpo_megatron.program import exit_code, write_report

COLUMNS = {
    "round": "round",
    "pairs": "pairs",
    "train/score": "right, drawn responses",
    "eval/score": "right, greedy, held out",
    "eval/tokens": "tokens, held out",
}


def run(options: argparse.Namespace) -> None:
    """Prints the table and draws the plot."""
    with options.rounds.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with options.offline.open(encoding="utf-8") as file:
        scored = [json.loads(line) for line in file]
    right = [response["score"] for row in scored for response in row["responses"]]
    offline = {
        "round": "offline",
        "pairs": str(options.pairs),
        "eval/score": str(sum(right) / len(right)),
        "eval/tokens": str(LengthReport.of(scored).means()["tokens"]),
    }
    table = Table(*COLUMNS.values(), title=f"{len(scored)} held-out questions")
    for row in (*rows, offline):
        table.add_row(*(_shown(row.get(name, "")) for name in COLUMNS))
    Console(highlight=False).print(table)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, name in zip(axes, ("eval/score", "eval/tokens"), strict=True):
        axis.plot([int(row["round"]) for row in rows], [float(row[name]) for row in rows], "o-", label="on-policy")
        axis.axhline(float(offline[name]), color="gray", linestyle="--", label="one offline round")
        axis.set(title=COLUMNS[name], xlabel="round", xticks=range(len(rows)))
        axis.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    write_report("--plot", options.plot, drawn.getvalue())
    print(f"Plot: {options.plot}")


def _shown(value: str) -> str:
    return f"{float(value):.3f}" if "." in value else value


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=Path, required=True, help="rounds.csv of the loop")
    parser.add_argument("--offline", type=Path, required=True, help="scored responses of the offline model")
    parser.add_argument("--pairs", type=int, required=True, help="pairs that each way was trained on")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file to write")
    return exit_code("report.py", lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
