"""Adapters without a GPU and without Megatron: out of checkpoints, into models, and compared. Memory is bounded.

    python tools/adapters.py convert --load RUN --hf-checkpoint BASE --save ADAPTER
    python tools/adapters.py merge --adapter ADAPTER --hf-checkpoint BASE --save MODEL
    python tools/adapters.py compare ADAPTER OTHER --hf-checkpoint BASE [--tolerance 1e-6]

`convert` makes a PEFT folder from the checkpoint of a run. RUN is its --save, or the folder of one iteration. `merge`
adds an adapter to its base in fp32 and rounds once. `compare` compares what two adapters add to each weight.

Exit code: 0; of `compare` 1 where the adapters differ; 2 for a mistake.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from simpo_megatron.checkpoint.cli import add_conversion_flags, carry_out, options_of
from simpo_megatron.errors import UserError
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value

COMMANDS = {
    "convert": "Checkpoint of a run -> PEFT folder.",
    "merge": "Base and adapter -> Hugging Face checkpoint.",
    "compare": "How far two adapters of one base are from each other.",
}


def build_parser(command: str) -> Parser:
    """The flags of a command."""
    parser = Parser(prog=f"adapters.py {command}", description=COMMANDS[command])
    if command == "compare":
        parser.add_argument("adapters", type=path_value, nargs=2, metavar="DIR", help="PEFT folder")
        tolerance = "relative difference that is allowed (default 1e-6)"
        parser.add_argument("--tolerance", type=_tolerance, default=1e-6, metavar="X", help=tolerance)
    else:
        name = "--load" if command == "convert" else "--adapter"
        parser.add_argument(name, type=path_value, required=True, metavar="DIR", help=f"the adapter to {command}")
        parser.add_argument("--save", type=path_value, required=True, metavar="DIR", help="folder to write")
    base = "folder of the base: a Hugging Face checkpoint"
    parser.add_argument("--hf-checkpoint", type=path_value, required=True, metavar="DIR", help=base)
    if command == "convert":
        add_conversion_flags(parser)
    return parser


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a finite number, and not negative")
    return value


def run(argv: Sequence[str] | None) -> int:
    """Runs one command; returns the exit code."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS:
        raise UserError(f"{command or 'nothing'} is not a command; give {', '.join(COMMANDS)} or --help")
    args = build_parser(command).parse_args(rest)
    from simpo_megatron.adapters.merge_files import compare_adapters, merge_files
    from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint, read_hf_config

    if command == "convert":
        return _convert(args)
    if command == "merge":
        merge_files(read_hf_checkpoint(args.hf_checkpoint), args.adapter, args.save)
        print(f"{args.save} is complete")
        return 0
    one, other = args.adapters
    worst, where, count = compare_adapters(one, other, read_hf_config(args.hf_checkpoint).architecture)
    print(f"{count} weights compared; the largest relative difference is {worst:.2e}, of {where}")
    return int(worst > args.tolerance)


def _convert(args: argparse.Namespace) -> int:
    from simpo_megatron.checkpoint.adapter import plan_to_peft, read_adapter
    from simpo_megatron.checkpoint.folder import checkpoint_folder
    from simpo_megatron.models.hf_checkpoint import read_hf_config

    hf = read_hf_config(args.hf_checkpoint)
    lora, saved = read_adapter(checkpoint_folder(args.load), hf)
    return carry_out(plan_to_peft(hf, lora, saved, args.save, options_of(args)), args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("adapters.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
