"""The data doctor: finds the faults of a preference set before training does.

    python tools/inspect_data.py --data SOURCE --hf-checkpoint DIR [--seq-length N] [--valid-data SOURCE]
        [--report FILE]

It reads the set as training does and counts: double, missing and lost BOS and EOS, template mismatches, tokens across
the boundary, truncation, empty, identical, tied, duplicated and contradictory pairs, odd characters, validation prompts
in the training data, length bias, padding. It shows one pair token by token (`--pair N`), with what is scored.
`--report` writes the same as an HTML page. Exit code 0; 1 where a fault blocks training (the table says what fixes it);
2 where the data cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from simpo_megatron import compat
from simpo_megatron.config.data_tools import data_config, data_parser
from simpo_megatron.data.checks import CHECKS
from simpo_megatron.data.doctor import Doctor
from simpo_megatron.data.prepared_format import is_prepared
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.reading import read_rows, with_progress
from simpo_megatron.data.report import print_report, write_html
from simpo_megatron.data.tokenizer import fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.files import end_of_turn_ids
from simpo_megatron.program import check_report, exit_code
from simpo_megatron.settings import path_value, source_value


def run(args: argparse.Namespace) -> int:
    """Examines the set, prints and writes the report, and returns the exit code."""
    compat.quiet_megatron()
    if args.pair < 1:
        raise UserError(f"--pair {args.pair} must be at least 1")
    if args.report is not None:
        sources = [Path(source) for source in (args.data, args.valid_data) if source is not None]
        check_report("--report", args.report, [*sources, args.hf_checkpoint])
    tokenizer, eos_ids = load_tokenizer(args.hf_checkpoint), end_of_turn_ids(args.hf_checkpoint)
    data = data_config(args)
    doctor = Doctor(tokenizer, data.options, eos_ids, data.seq_length, args.pair)
    if args.valid_data is not None:
        doctor.remember_prompts(args.valid_data)
    if is_prepared(args.data):
        pairs = PreparedPairs(args.data, verify=False)
        pairs.verify()
        pairs.check(fingerprint(tokenizer, eos_ids), {}, args.hf_checkpoint)
        doctor.examine_prepared(pairs)
    else:
        doctor.examine_rows(with_progress(read_rows(args.data), f"Examining {args.data}"))
    doctor.finish()
    if args.pair > doctor.rows:
        raise UserError(
            f"--pair {args.pair}: {args.data} has {doctor.rows} rows; give a number from 1 to {doctor.rows}"
        )
    print_report(doctor, args.data)
    if args.report is not None:
        write_html(doctor, args.data, args.report)
        print(f"report: {args.report}")
    return 1 if any(doctor.blocks(name) for name in CHECKS) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def action() -> int:
        parser = data_parser("inspect_data.py", __doc__)
        parser.add_argument(
            "--data",
            required=True,
            type=source_value,
            metavar="SOURCE",
            help="a prepared prefix, or what it is made of",
        )
        parser.accept("--train-data", "--data")
        parser.add_argument(
            "--hf-checkpoint", required=True, type=path_value, metavar="DIR", help="folder of the model: its tokenizer"
        )
        parser.add_argument(
            "--valid-data",
            type=source_value,
            default=None,
            metavar="SOURCE",
            help="rows whose prompts must not be in --data",
        )
        parser.add_argument("--pair", type=int, default=1, metavar="N", help="the pair to show, from 1 (default 1)")
        parser.add_argument("--report", type=path_value, default=None, metavar="FILE", help="write an HTML page here")
        return run(parser.parse_args(argv))

    return exit_code("inspect_data.py", action)


if __name__ == "__main__":
    sys.exit(main())
