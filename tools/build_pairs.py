"""Several scored responses to each prompt -> preference pairs, as JSON Lines.

    python tools/build_pairs.py --data FILE --output FILE [--strategy best-worst|best-random|all] [--min-score-gap X]

A row of the input has `prompt` (a text or messages) and `responses`, a list of {"content": ..., "score": ...}; a higher
score is better. best-worst makes one pair a prompt, as the paper does; best-random pairs the best response with any
other; all pairs every two responses. Equal responses are merged, and their scores averaged. A response that was cut
(`finish_reason` "length") is not chosen. Pairs with equal scores, or with a gap below --min-score-gap, are left out,
and their prompts are counted. With --verify-pairs and --judge-url a model confirms every pair.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from simpo_megatron.config.arguments import add_settings, build_group, settable
from simpo_megatron.data.pairing import PairingOptions, PairingReport, build_pairs, write_pairs
from simpo_megatron.data.reading import read_rows, with_progress
from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.scorers.judge import Judge
from simpo_megatron.on_policy.scorers.settings import JudgeSettings
from simpo_megatron.on_policy.verification import Policy, verified
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import flag, path_value, source_value


def check(argv: Sequence[str]) -> None:
    """Raises UserError if a flag is wrong. tools/iterate.py asks before its first round."""
    _options(build_parser().parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Builds the pairs, and prints what became of the prompts."""
    options, policy, settings = _options(args)
    if Path(args.data).resolve() == args.output.resolve():
        raise UserError(f"--output {args.output} is the input; choose another file")
    if not args.output.name.endswith((".jsonl", ".json")):
        raise UserError(f"--output {args.output}: pairs are written as JSON lines; give a name that ends in .jsonl")
    judge = None if settings is None else Judge(settings)
    report = PairingReport()
    rows = with_progress(read_rows(args.data), f"Pairing {args.data}")

    def pairs() -> Iterator[dict[str, Any]]:
        built: Iterable[dict[str, Any]] = build_pairs(rows, report, options)
        yield from built if judge is None or policy is None else verified(built, judge, policy, report)
        if not report.pairs:  # raised before the file is moved to its name
            raise report.nothing(args.data, options.min_score_gap)

    write_pairs(pairs(), args.output)
    print(report.summary(args.output))


def _options(args: argparse.Namespace) -> tuple[PairingOptions, Policy | None, JudgeSettings | None]:
    """How pairs are made, and by which judge they are verified."""
    policy: Policy | None = getattr(args, "verify_pairs", None)
    if policy is None and (unused := [name.name for name in settable(JudgeSettings) if name.name in vars(args)]):
        raise UserError(f"{flag(unused[0])} needs --verify-pairs drop or flip")
    judge = None if policy is None else build_group(JudgeSettings, vars(args))
    return build_group(PairingOptions, vars(args)), policy, judge


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        "build_pairs.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--data", required=True, type=source_value, metavar="SOURCE", help="prompts with scored responses"
    )
    parser.accept("--input", "--data")
    parser.add_argument("--output", required=True, type=path_value, metavar="FILE", help="the .jsonl to write")
    add_settings(parser, PairingOptions)
    judge = parser.add_argument_group("verification by a judge, a server with OpenAI's interface")
    judge.add_argument(
        "--verify-pairs",
        choices=get_args(Policy),
        help="ask a judge about every pair; drop or flip those whose rejected response it prefers",
    )
    add_settings(judge, JudgeSettings)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code("build_pairs.py", lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
