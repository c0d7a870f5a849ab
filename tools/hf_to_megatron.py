"""Converts a Hugging Face checkpoint to Megatron's formats, without a GPU, without Megatron and in bounded memory.

    python tools/hf_to_megatron.py --hf-checkpoint MODEL --save OUT [--plan] [--max-memory 1GiB] [--workers 4]
    python tools/hf_to_megatron.py --hf-checkpoint MODEL --save OUT --format torch --tensor-model-parallel-size 8

Megatron-LM and the trainer of this package then start from `--load OUT`. OUT/release/megatron_args.yaml has the
arguments that belong to it. `torch_dist`, the default, loads at every layout. Exit code 2 and one line for a mistake.
All of it is in simpo_megatron/checkpoint/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from simpo_megatron.checkpoint.cli import add_conversion_flags, carry_out, options_of, positive
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="hf_to_megatron.py", description="Hugging Face checkpoint -> Megatron checkpoint.")
    parser.add_argument("--hf-checkpoint", type=path_value, required=True, metavar="DIR", help="what to convert")
    parser.add_argument("--save", type=path_value, required=True, metavar="DIR", help="where; DIR/release is made")
    parser.add_argument("--format", choices=("torch_dist", "torch"), default="torch_dist", help="(default torch_dist)")
    add_conversion_flags(parser)
    group = parser.add_argument_group("layout, for --format torch alone")
    group.add_argument("--tensor-model-parallel-size", type=positive, metavar="N")
    group.add_argument("--pipeline-model-parallel-size", type=positive, metavar="N")
    group.add_argument("--num-layers-per-virtual-pipeline-stage", type=positive, metavar="N")
    group.add_argument("--expert-model-parallel-size", type=positive, metavar="N")
    group.add_argument("--decoder-first-pipeline-num-layers", type=positive, metavar="N")
    group.add_argument("--decoder-last-pipeline-num-layers", type=positive, metavar="N")
    group.add_argument(
        "--transformer-impl", choices=("transformer_engine", "local"), help="whose names (default the first)"
    )
    group.add_argument("--moe-grouped-gemm", action="store_const", const=True, help="names of grouped experts")
    group.add_argument("--make-vocab-size-divisible-by", type=positive, metavar="N", help="(default 128)")
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Converts; 0 when the checkpoint, or this shard of it, is written."""
    args = build_parser().parse_args(argv)
    from simpo_megatron.checkpoint.formats.rank_files_writer import RankLayout
    from simpo_megatron.checkpoint.source import has_weights, imagine_weights, read_source
    from simpo_megatron.checkpoint.to_megatron import plan_to_megatron
    from simpo_megatron.errors import UserError
    from simpo_megatron.models.hf_checkpoint import read_hf_config

    given = {name: getattr(args, name) for name in RankLayout.__dataclass_fields__ if getattr(args, name) is not None}
    if given and args.format == "torch_dist":
        flag = "--" + next(iter(given)).replace("_", "-")
        raise UserError(f"{flag} is of --format torch; torch_dist loads at every layout, so drop it")
    imagined = args.plan and args.hf_checkpoint.is_dir() and not has_weights(args.hf_checkpoint)
    hf = imagine_weights(read_hf_config(args.hf_checkpoint)) if imagined else read_source(args.hf_checkpoint)
    layout = RankLayout(**given) if args.format == "torch" else None
    conversion = plan_to_megatron(hf, layout, args.save, options_of(args))
    return carry_out(conversion, args, then=f"; `--load {args.save}` reads it")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code("hf_to_megatron.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
