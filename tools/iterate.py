"""Rounds of on-policy training: answer prompts with the model, score, build pairs, train, evaluate, and again.

    python tools/iterate.py --config loop.yaml

The loop stops anywhere and goes on with the same command. FOLDER/round_N/ holds all files of a round, and
FOLDER/rounds.csv the table over the rounds. Each round trains the model of the round before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from simpo_megatron.config.arguments import parse
from simpo_megatron.on_policy import loop_config
from simpo_megatron.on_policy.iteration import PROGRAMS, Loop, show_table
from simpo_megatron.on_policy.loop_config import LoopConfig
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the other programs


def run(args: argparse.Namespace) -> None:
    """Runs the loop, and prints the table."""
    config = LoopConfig.read(args.config)
    checks = {section: import_module(program).check for section, program in PROGRAMS.items()}
    show_table(Loop(config, {**checks, "train": parse}).run())
    print(f"The last model: {config.folder}/round_{config.rounds}/model")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(
        "iterate.py",
        description=f"{__doc__}\nThe file:\n{str(loop_config.__doc__).partition(chr(10))[2]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=path_value, required=True, metavar="FILE", help="the loop, see above")
    return exit_code("iterate.py", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
