"""Converts a Megatron checkpoint, torch_dist or torch, to Hugging Face safetensors, in bounded memory.

    python tools/megatron_to_hf.py --load RUN --hf-checkpoint MODEL --save OUT [--plan] [--dtype bfloat16] [--workers 4]

RUN is what some --save wrote to (its tracker names the iteration), or the folder of one iteration. No Megatron is
needed. Optimizer state is left out. config.json, tokenizer, chat template and generation config are copied from MODEL.
Without --hf-checkpoint, config.json is made from the arguments in the checkpoint. Exit code 2 and one line for a
mistake. All of it is in simpo_megatron/checkpoint/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from simpo_megatron.checkpoint.cli import add_conversion_flags, carry_out, options_of, positive
from simpo_megatron.errors import UserError
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="megatron_to_hf.py", description="Megatron checkpoint -> Hugging Face checkpoint.")
    parser.add_argument("--load", type=path_value, required=True, metavar="DIR", help="what to convert")
    parser.add_argument(
        "--hf-checkpoint", type=path_value, metavar="DIR", help="folder whose config and tokenizer go with the weights"
    )
    parser.accept("--hf-reference", "--hf-checkpoint")
    parser.add_argument("--save", type=path_value, required=True, metavar="DIR", help="where")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of all tensors (default: the checkpoint's)")
    parser.add_argument("--vocab-size", type=positive, metavar="N", help="without padding; instead of --hf-checkpoint")
    parser.add_argument(
        "--drop-trained-padding",
        action="store_true",
        help="leave out rows beyond the vocabulary even if they are not zero",
    )
    add_conversion_flags(parser)
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Converts; 0 when the checkpoint, or this shard of it, is written."""
    args = build_parser().parse_args(argv)
    from simpo_megatron.checkpoint.folder import checkpoint_folder, read_args
    from simpo_megatron.checkpoint.saved_args import checkpoint_of_args
    from simpo_megatron.checkpoint.to_hf import check_padding, plan_to_hf, read_checkpoint
    from simpo_megatron.models.hf_checkpoint import read_hf_config

    for flag, source in (("--hf-checkpoint", args.hf_checkpoint), ("--load", args.load)):
        if source is not None and args.save.resolve() == source.resolve():
            raise UserError(f"--save {args.save} is the folder of {flag}, which is read; give a new folder")
    if args.hf_checkpoint is not None and args.vocab_size is not None:
        raise UserError(
            f"--vocab-size {args.vocab_size} is for conversions without --hf-checkpoint, and config.json in "
            f"{args.hf_checkpoint} has a vocabulary; drop one of the two"
        )
    folder = checkpoint_folder(args.load)
    if args.hf_checkpoint:
        hf = read_hf_config(args.hf_checkpoint)
    else:
        hf = checkpoint_of_args(folder, read_args(folder), args.vocab_size)
    saved = read_checkpoint(folder, hf)
    if not args.drop_trained_padding:
        check_padding(saved)
    return carry_out(plan_to_hf(hf, saved, args.save, options_of(args), DTYPES.get(args.dtype)), args)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code("megatron_to_hf.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
