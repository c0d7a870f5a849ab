"""What the programs in tools/ share: flags, sizes, and how a mistake ends."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from simpo_megatron.errors import UserError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes as `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def parse_size(text: str) -> int:
    """Bytes.

    >>> parse_size("1GiB"), parse_size("1.5 GB")
    (1073741824, 1500000000)
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    try:
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 1GiB or 512MiB")
    return size


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n`, counted from 1, as (i - 1, n)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; write 1/4 for the first of four")
    return int(match[1]) - 1, int(match[2])


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def human(size: float) -> str:
    """A number of bytes to read.

    >>> human(1536), human(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of everything that moves bytes."""
    parser.add_argument("--max-memory", type=parse_size, default=2**30, metavar="SIZE",
                        help="bound of the buffers of all workers together (default 1GiB)")  # fmt: skip
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes on this node (default 1)")


def add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of both directions."""
    add_work_flags(parser)
    parser.add_argument("--plan", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="i/n",
                        help="this node does the i-th of n shares, on a file system all nodes share")  # fmt: skip
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    again.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote")


def run_program(name: str, run: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Runs a program; a mistake is one line on stderr and exit code 2."""
    try:
        return run(argv)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return 130
