"""Several scored responses to each prompt -> preference pairs, as JSON Lines.

    python tools/build_pairs.py --data FILE --output FILE [--strategy best-worst|best-random|all] [--min-score-gap X]

A row of the input has `prompt` (a text or messages) and `responses`, a list of {"content": ..., "score": ...}; a higher
score is better. best-worst makes one pair a prompt, as the paper does; best-random pairs the best response with any
other; all pairs every two responses. Pairs with equal scores, or with a gap below --min-score-gap, are left out, and
their prompts are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from simpo_megatron.data.pairing import PairingReport, Strategy, build_pairs, write_pairs
from simpo_megatron.data.reading import read_rows, with_progress
from simpo_megatron.errors import UserError
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value, source_value


def run(args: argparse.Namespace) -> None:
    """Builds the pairs, and prints what became of the prompts."""
    if not 0 <= args.min_score_gap < float("inf"):
        raise UserError(f"--min-score-gap {args.min_score_gap} must be at least 0")
    if Path(args.data).resolve() == args.output.resolve():
        raise UserError(f"--output {args.output} is the input; choose another file")
    if not args.output.name.endswith((".jsonl", ".json")):
        raise UserError(f"--output {args.output}: pairs are written as JSON lines; give a name that ends in .jsonl")
    report = PairingReport()
    rows = with_progress(read_rows(args.data), f"Pairing {args.data}")

    def pairs() -> Iterator[dict[str, Any]]:
        yield from build_pairs(rows, report, args.strategy, args.min_score_gap, args.seed)
        if not report.pairs:  # raised before the file is moved to its name
            raise report.nothing(args.data, args.min_score_gap)

    write_pairs(pairs(), args.output)
    print(report.summary(args.output))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser("build_pairs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, type=source_value, metavar="SOURCE", help="prompts with scored responses"
    )
    parser.accept("--input", "--data")
    parser.add_argument("--output", required=True, type=path_value, metavar="FILE", help="the .jsonl to write")
    parser.add_argument("--strategy", choices=get_args(Strategy), default="best-worst", help="default best-worst")
    parser.add_argument("--min-score-gap", type=float, default=0.0, metavar="X", help="default 0: any difference")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of best-random")
    return exit_code("build_pairs.py", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
