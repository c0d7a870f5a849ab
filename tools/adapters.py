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
import sys
from collections.abc import Sequence

from simpo_megatron.checkpoint.cli import add_conversion_flags, print_end
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value


def build_parser() -> argparse.ArgumentParser:
    """The three commands and their flags."""
    parser = Parser(prog="adapters.py", description=str(__doc__).partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    base = "folder of the base: a Hugging Face checkpoint"

    convert = commands.add_parser("convert", help="checkpoint of a run -> PEFT folder")
    convert.add_argument("--load", type=path_value, required=True, metavar="DIR", help="what to convert")
    convert.add_argument("--hf-checkpoint", type=path_value, required=True, metavar="DIR", help=base)
    convert.add_argument("--save", type=path_value, required=True, metavar="DIR", help="where")
    add_conversion_flags(convert)

    merge = commands.add_parser("merge", help="base and adapter -> Hugging Face checkpoint")
    merge.add_argument("--adapter", type=path_value, required=True, metavar="DIR", help="PEFT folder")
    merge.add_argument("--hf-checkpoint", type=path_value, required=True, metavar="DIR", help=base)
    merge.add_argument("--save", type=path_value, required=True, metavar="DIR", help="where")

    compare = commands.add_parser("compare", help="two adapters of one base")
    compare.add_argument("adapters", type=path_value, nargs=2, metavar="DIR", help="PEFT folder")
    compare.add_argument("--hf-checkpoint", type=path_value, required=True, metavar="DIR", help=base)
    compare.add_argument(
        "--tolerance", type=float, default=1e-6, metavar="X", help="relative difference that is allowed (default 1e-6)"
    )
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Runs one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    from simpo_megatron.adapters.merge_files import compare_adapters, merge_files
    from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint, read_hf_config

    if args.command == "convert":
        return _convert(args)
    if args.command == "merge":
        merge_files(read_hf_checkpoint(args.hf_checkpoint), args.adapter, args.save)
        print(f"{args.save} is complete")
        return 0
    architecture = read_hf_config(args.hf_checkpoint).architecture
    worst, where, count = compare_adapters(*args.adapters, architecture)
    print(f"{count} weights compared; the largest relative difference is {worst:.2e}, of {where}")
    return int(worst > args.tolerance)


def _convert(args: argparse.Namespace) -> int:
    from simpo_megatron.checkpoint.adapter import plan_to_peft, read_adapter
    from simpo_megatron.checkpoint.estimate import print_plan
    from simpo_megatron.checkpoint.folder import checkpoint_folder
    from simpo_megatron.checkpoint.transfer import publish
    from simpo_megatron.models.hf_checkpoint import read_hf_config

    hf = read_hf_config(args.hf_checkpoint)
    lora, saved = read_adapter(checkpoint_folder(args.load), hf)
    options = publish.Options(args.max_memory, args.workers, args.shard, args.resume, args.overwrite)
    conversion = plan_to_peft(hf, lora, saved, args.save, options)
    if args.plan:
        print_plan(conversion, options)
        return 0
    print_end(publish.run(conversion, options), conversion.final, args.shard)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("adapters.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
