"""Preferences -> a prepared set: tokenized once, the same for any number of workers, mapped from disk by training.

    python tools/preprocess_preferences.py --data SOURCE --hf-checkpoint DIR --output-prefix PREFIX [--workers N]

SOURCE is a .jsonl (or .json, the same lines), .jsonl.gz or .parquet file, a folder that `datasets` saved (FOLDER or
FOLDER:SPLIT) or a dataset of the hub (OWNER/NAME or OWNER/NAME:SPLIT). Only the tokenizer of the checkpoint and the ids
that end a turn are read. PREFIX.bin and .idx are Megatron's IndexedDataset; the sequences of a document are prompt,
chosen and rejected response. PREFIX.pairs.npy and .json hold the rest. Train with `--train-data PREFIX`. A mistake ends
with one line and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from simpo_megatron import compat
from simpo_megatron.config.data_tools import data_config, data_parser
from simpo_megatron.data.prepare import prepare
from simpo_megatron.data.prepared_format import is_prepared
from simpo_megatron.errors import UserError
from simpo_megatron.program import exit_code
from simpo_megatron.settings import path_value, source_value


def run(args: argparse.Namespace) -> None:
    """Prepares the set, and prints what became of the rows."""
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")
    compat.quiet_megatron()
    if is_prepared(args.data):
        raise UserError(f"--data {args.data} is prepared already; give the source it was made from")
    started = time.perf_counter()
    options = data_config(args).options
    report = prepare(args.data, args.hf_checkpoint, args.output_prefix, options, workers=args.workers, progress=True)
    seconds = time.perf_counter() - started
    print(report.summary(args.data))
    print(f"{args.output_prefix}: {report.pairs} pairs in {seconds:.1f} s, {report.rows / seconds:.0f} rows/s")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def action() -> None:
        parser = data_parser("preprocess_preferences.py", __doc__)
        parser.add_argument("--data", required=True, type=source_value, metavar="SOURCE", help="the preferences")
        for old in ("--input", "--train-data"):
            parser.accept(old, "--data")
        parser.add_argument(
            "--hf-checkpoint", required=True, type=path_value, metavar="DIR", help="folder of the model: its tokenizer"
        )
        parser.add_argument("--output-prefix", required=True, type=path_value, metavar="PREFIX", help="files to write")
        parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the cores)")
        run(parser.parse_args(argv))

    return exit_code("preprocess_preferences.py", action)


if __name__ == "__main__":
    sys.exit(main())
