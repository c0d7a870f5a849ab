"""What the converting programs in tools/ share: flags, and the last line."""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

from simpo_megatron.settings import parse_size


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


def print_end(complete: bool, folder: Path, shard: tuple[int, int], then: str = "") -> None:
    """Prints how a conversion ended.

    Args:
        complete: whether `folder` is complete, or only this node's share of it.
        folder: the checkpoint.
        shard: the share of this node.
        then: what can be done with the complete checkpoint; goes behind the sentence.
    """
    if complete:
        print(f"{folder} is complete{then}")
    else:
        index, count = shard
        print(f"share {index + 1}/{count} is written; the node that finishes last publishes {folder}")
