"""Proves that a Megatron checkpoint has the weights of a Hugging Face model, bit for bit.

    python tools/verify_checkpoint.py --hf-checkpoint MODEL --load OUT [--workers 4]
    python tools/verify_checkpoint.py --hf-checkpoint MODEL --load OUT --logits
    python tools/verify_checkpoint.py --load OUT

The last line compares with the hashes in OUT/release/conversion.json. Exit code 0: equal. 1: a difference was found,
and is named. 2: bad input. All of it is in simpo_megatron/checkpoint/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from simpo_megatron.checkpoint.cli import add_work_flags
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="verify_checkpoint.py", description="Compares a Megatron checkpoint with its source.")
    parser.add_argument(
        "--hf-checkpoint", type=path_value, metavar="DIR", help="the source; if absent, the recorded hashes do"
    )
    parser.add_argument("--load", type=path_value, required=True, metavar="DIR", help="the Megatron checkpoint")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="also run both models in fp32 on the CPU, layer by layer, and compare hidden states and logits",
    )
    add_work_flags(parser)
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Compares; 0 for equal, 1 for a difference."""
    args = build_parser().parse_args(argv)
    from simpo_megatron.checkpoint.folder import checkpoint_folder, read_args
    from simpo_megatron.checkpoint.manifest import read_manifest
    from simpo_megatron.checkpoint.saved_args import checkpoint_of_args
    from simpo_megatron.checkpoint.source import read_source
    from simpo_megatron.checkpoint.to_hf import read_checkpoint
    from simpo_megatron.checkpoint.transfer.publish import Options
    from simpo_megatron.checkpoint.verify import verify
    from simpo_megatron.errors import UserError

    folder = checkpoint_folder(args.load)
    manifest = read_manifest(folder)
    if args.hf_checkpoint is None and (manifest is None or args.logits):
        raise UserError(f"{folder} has nothing to compare with; give --hf-checkpoint")
    source = read_source(args.hf_checkpoint) if args.hf_checkpoint else None
    rows = (manifest or {}).get("model", {}).get("vocabulary_rows")
    hf = source or checkpoint_of_args(folder, read_args(folder), rows)
    options = Options(args.max_memory, args.workers)
    saved = read_checkpoint(folder, hf)
    differences, compared = verify(saved, source, manifest, options)
    for difference in differences:
        print(difference)
    if differences:
        print(f"{len(differences)} differences in {compared} tensors")
        return 1
    print(f"{compared} tensors are equal, bit for bit")
    if args.logits:
        from simpo_megatron.verify.layers import compare_forward

        return compare_forward(hf, saved)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code("verify_checkpoint.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
