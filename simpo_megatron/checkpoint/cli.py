"""What the converting programs in tools/ share: flags, running a plan, and the last line."""

from __future__ import annotations

import argparse
import re
from functools import partial
from typing import TYPE_CHECKING

from simpo_megatron.settings import parse_size

if TYPE_CHECKING:
    from simpo_megatron.checkpoint.transfer.publish import Conversion, Options


def parse_shard(text: str) -> tuple[int, int]:
    """The value of --shard: `i/n`, counted from 1, as (i - 1, n).

    >>> parse_shard("1/4")
    (0, 4)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard; write 1/4 for the first of four")
    return int(match[1]) - 1, int(match[2])


def positive(text: str) -> int:
    """The value of a flag that takes a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of everything that moves bytes."""
    parser.add_argument(
        "--max-memory",
        type=partial(parse_size, "--max-memory"),
        default=2**30,
        metavar="SIZE",
        help="bound of the buffers of all workers together (default 1GiB)",
    )
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes on this node (default 1)")


def add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of both directions."""
    add_work_flags(parser)
    parser.add_argument("--plan", action="store_true", help="print what would be written, and write nothing")
    parser.add_argument(
        "--shard",
        type=parse_shard,
        default=(0, 1),
        metavar="i/n",
        help="this node does the i-th of n shares, on a file system that all nodes share",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    again.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote")


def options_of(args: argparse.Namespace) -> Options:
    """What the flags of `add_conversion_flags` ask for."""
    from simpo_megatron.checkpoint.transfer.publish import Options

    return Options(args.max_memory, args.workers, args.shard, args.resume, args.overwrite)


def carry_out(conversion: Conversion, args: argparse.Namespace, then: str = "") -> int:
    """Runs a conversion, or with --plan prints it, and prints how it ended.

    Args:
        conversion: that is planned.
        args: with the flags of `add_conversion_flags`.
        then: what can be done with the complete checkpoint; goes behind the sentence.

    Returns:
        The exit code.

    Raises:
        UserError: a file cannot be read or written.
    """
    from simpo_megatron.checkpoint.estimate import print_plan
    from simpo_megatron.checkpoint.transfer import publish

    options = options_of(args)
    if args.plan:
        print_plan(conversion, options)
    elif publish.run(conversion, options):
        print(f"{conversion.final} is complete{then}")
    else:
        index, count = args.shard
        print(f"share {index + 1}/{count} is written; the node that finishes last publishes {conversion.final}")
    return 0
