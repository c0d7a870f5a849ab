"""--plan: the tensors with their destination, bytes and dtype, then the time, disk and memory of the conversion.

Peak memory is estimated as the interpreter with torch, each worker's interpreter, its buffers, and the plan itself.
Time is bytes over the speed of the target's disk, which is measured by writing a little, or assumed.
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from simpo_megatron.checkpoint.transfer.execute import BUFFERS
from simpo_megatron.checkpoint.transfer.moves import Unit
from simpo_megatron.checkpoint.transfer.publish import Conversion, Options, PlanLine, check_space
from simpo_megatron.disk import existing_folder, free_bytes, human

WORKER = 60 * 2**20  # a worker's interpreter with numpy
TRIAL = 64 * 2**20  # bytes written to measure a disk
ASSUMED_SPEED = 500e6  # bytes per second, where nothing may be written


@dataclass(frozen=True)
class Estimate:
    """What running a plan needs.

    Attributes:
        disk: bytes to write, by all nodes.
        share: those of this node.
        memory: peak resident bytes of all processes of this node.
        seconds: on this node.
        speed: bytes per second, of which the seconds follow.
    """

    disk: int
    share: int
    memory: int
    seconds: float
    speed: float


def estimate(units: Sequence[Unit], options: Options, speed: float) -> Estimate:
    """What running `units` needs on this node, whose disk takes `speed` bytes per second.

    Called after planning: the memory of the plan is then a part of what this process has taken.
    """
    pieces = [piece for unit in units for move in unit.moves for piece in move.pieces]
    largest = max((piece.size for piece in pieces), default=0)
    copied = any(
        piece.swap or piece.cast or any(rect.stride != rect.row_bytes for rect in piece.writes) for piece in pieces
    )
    buffers = (BUFFERS * (2 if copied else 1) + 1) * largest
    workers = min(options.workers, len(units))
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    index, count = options.shard
    disk, share = (sum(file.size for unit in part for file in unit.files) for part in (units, units[index::count]))
    memory = here + (buffers if workers == 1 else workers * (WORKER + buffers))
    return Estimate(disk, share, memory, share / speed, speed)


def disk_speed(folder: Path) -> float:
    """Bytes per second that the disk of a folder, or of its nearest parent, takes, written and synced."""
    probe = existing_folder(folder) / f".write_probe_{os.getpid()}"
    try:
        start = time.perf_counter()
        with probe.open("wb") as stream:
            stream.write(os.urandom(2**20) * (TRIAL // 2**20))
            stream.flush()
            os.fdatasync(stream.fileno())
        return TRIAL / (time.perf_counter() - start)
    except OSError:
        return ASSUMED_SPEED
    finally:
        with suppress(OSError):  # on a read-only disk
            probe.unlink(missing_ok=True)


def print_plan(conversion: Conversion, options: Options) -> None:
    """Prints the plan of a conversion and what running it would need.

    Raises:
        UserError: the disk has no room for what is to be written.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in folded(conversion.lines):
        console.print(line)
    found = estimate(conversion.units, options, disk_speed(conversion.root))
    files = sum(len(unit.files) for unit in conversion.units)
    tensors = sum(len(unit.moves) for unit in conversion.units)
    index, count = options.shard
    share = f", {human(found.share)} of it by share {index + 1}/{count}" if count > 1 else ""
    console.print(
        f"{tensors} tensors into {files} files, {human(found.disk)} to write{share}; "
        f"{human(free_bytes(conversion.root))} are free\n"
        f"peak memory about {human(found.memory)}; about {found.seconds / 60:.1f} minutes at "
        f"{found.speed / 1e6:.0f} MB/s of this disk"
    )
    check_space(conversion)


def folded(lines: Sequence[PlanLine]) -> list[str]:
    """One line for all tensors that differ in their numbers alone (layer, expert, file), in the order of the first.

    >>> folded([PlanLine(f"layers.{i}.up", f"up.{i} [8, 4] in {i}.bin", 64, "BF16") for i in range(3)])
    ['layers.0.up -> up.0 [8, 4] in 0.bin  64 B BF16, and 2 like it']
    """
    groups: dict[tuple[str, ...], list[PlanLine]] = {}
    for line in lines:
        pattern = (re.sub(r"\d+", "#", line.source), re.sub(r"\d+", "#", line.target), str(line.size), line.dtype)
        groups.setdefault(pattern, []).append(line)
    return [
        _text(group[0]) + (f", and {len(group) - 1} like it" if len(group) > 1 else "") for group in groups.values()
    ]


def _text(line: PlanLine) -> str:
    return f"{line.source} -> {line.target}  {human(line.size)} {line.dtype}"
