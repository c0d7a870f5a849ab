"""Scores responses: by a reward model, by a Python function, or by a judge behind a server.

    python tools/score_responses.py --responses responses.jsonl --reward-model DIR --output scored.jsonl
    python tools/score_responses.py --responses responses.jsonl --scorer module:function --output scored.jsonl
    python tools/score_responses.py --responses responses.jsonl --judge-url URL --output scored.jsonl

Each row keeps its columns, and each response gets a `score`; a higher one is better. A run that was stopped goes on
with the same command. tools/build_pairs.py is next.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from simpo_megatron.config.arguments import add_settings, build_group, heading
from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.choice import flag_of_another
from simpo_megatron.on_policy.journal import Journal
from simpo_megatron.on_policy.scorers import CHOSEN_BY, SCORERS
from simpo_megatron.on_policy.scorers.base import Scorer
from simpo_megatron.on_policy.scoring import made_from, score_responses
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import Group, flag, path_value, source_value

SETTINGS = {name: entry.settings for name, entry in SCORERS.items()}


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        "score_responses.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--responses", type=source_value, required=True, metavar="SOURCE", help="rows with `prompt` and `responses`"
    )
    parser.add_argument("--output", type=path_value, required=True, metavar="FILE", help="the .jsonl to write")
    for group in SETTINGS.values():
        add_settings(parser.add_argument_group(heading(group)), group)
    return parser


def check(argv: Sequence[str]) -> None:
    """Raises UserError if a flag is wrong, or the scorer is not there. tools/iterate.py asks before its first round."""
    scorer, settings = _chosen(build_parser().parse_args(argv))
    scorer.check(settings)


def run(args: argparse.Namespace) -> None:
    """Scores the responses."""
    kind, settings = _chosen(args)
    if Path(args.responses).resolve() == args.output.resolve():
        raise UserError(f"--output {args.output} is the input; choose another file")
    scorer: Scorer = kind(settings)
    with Journal.open("--output", args.output, scorer.about(), made_from) as journal:
        progress = score_responses(args.responses, scorer, journal)
        print(f"{args.output}: {len(journal.done)} prompts scored; {progress.tokens_per_second:,.0f} tokens/s")


def _chosen(args: argparse.Namespace) -> tuple[type[Scorer], Group]:
    """The class of the scorer that is asked for, and its settings."""
    given = vars(args)
    chosen = [name for name in CHOSEN_BY if name in given]
    if len(chosen) != 1:
        flags = ", ".join(flag(name) for name in CHOSEN_BY)
        raise UserError(f"{len(chosen)} scorers are given; give one of {flags}")
    name = CHOSEN_BY[chosen[0]]
    if (other := flag_of_another(name, SETTINGS, given)) is not None:
        raise UserError(f"{flag(other[0])} has no effect with {flag(chosen[0])}; drop it")
    return SCORERS[name].load(), build_group(SETTINGS[name], given)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("score_responses.py", lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
