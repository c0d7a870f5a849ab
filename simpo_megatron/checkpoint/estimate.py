"""What a conversion would do: every tensor with its destination, bytes and dtype, then time, disk and memory.

The estimates: peak memory is what the interpreter with torch takes, each worker's interpreter, its buffers and the plan
itself; time is bytes over the speed of the target's disk, which is measured by writing a little, or assumed.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from simpo_megatron.checkpoint.cli import human
from simpo_megatron.checkpoint.parameters import Block, MegatronParameter
from simpo_megatron.checkpoint.to_hf import Export
from simpo_megatron.checkpoint.to_megatron import Conversion
from simpo_megatron.checkpoint.transfer.execute import BUFFERS
from simpo_megatron.checkpoint.transfer.moves import Unit
from simpo_megatron.checkpoint.transfer.publish import Options

WORKER = 60 * 2**20  # a worker's interpreter with numpy
TRIAL = 64 * 2**20  # bytes written to measure a disk
ASSUMED_SPEED = 500e6  # bytes per second, where nothing may be written


@dataclass(frozen=True)
class Estimate:
    """Bytes to write, peak resident bytes of all processes, seconds, and the speed they follow from."""

    disk: int
    memory: int
    seconds: float
    speed: float


def estimate(units: Sequence[Unit], options: Options, speed: float) -> Estimate:
    """What running `units` needs, on this node, at `speed` bytes per second.

    Called after planning: the plan's own memory is then part of what this process has taken.
    """
    slab = max((slab.size for unit in units for step in unit.steps for slab in step.slabs), default=0)
    strided = any(
        rect.stride != rect.row_bytes for unit in units for step in unit.steps for s in step.slabs for rect in s.writes
    )
    buffers = (BUFFERS * (2 if strided else 1) + 1) * slab
    workers = min(options.workers, len(units))
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    disk = sum(file.size for unit in units for file in unit.files)
    memory = here + (buffers if workers == 1 else workers * (WORKER + buffers))
    return Estimate(disk, memory, disk / speed / options.shard[1], speed)


def disk_speed(folder: Path) -> float:
    """Bytes per second that the disk of a folder, or of its nearest parent, takes, written and synced."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    probe = parent / f".write_probe_{os.getpid()}"
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
        probe.unlink(missing_ok=True)


def report_to_megatron(conversion: Conversion, options: Options, save: Path) -> None:
    """Prints the plan of a conversion to Megatron."""
    rows = ((", ".join(item.hf), _to(item, blocks), item.size, item.dtype) for item, blocks in conversion.items)
    _report(rows, conversion.units, options, save)


def report_to_hf(export: Export, options: Options, save: Path) -> None:
    """Prints the plan of a conversion to Hugging Face."""
    _report(((t.source, f"{t.name} in {t.file}", t.size, t.dtype) for t in export.tensors), export.units, options, save)


def _to(item: MegatronParameter, blocks: Sequence[Block]) -> str:
    files = sorted({block.file for block in blocks})
    where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return f"{item.name} {list(item.shape)} in {where}"


def _report(rows: Iterable[tuple[str, str, int, str]], units: Sequence[Unit], options: Options, save: Path) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for source, target, size, dtype in rows:
        console.print(f"{source} -> {target}  {human(size)} {dtype}")
    console.print(summary(estimate(units, options, disk_speed(save)), units, save))


def summary(found: Estimate, units: Sequence[Unit], save: Path) -> str:
    """The last lines of a plan."""
    parent = next(path for path in (save, *save.absolute().parents) if path.is_dir())
    files, tensors = sum(len(unit.files) for unit in units), sum(len(unit.steps) for unit in units)
    return (
        f"{tensors} tensors into {files} files, {human(found.disk)} to write; "
        f"{human(shutil.disk_usage(parent).free)} are free\n"
        f"peak memory about {human(found.memory)}; about {found.seconds / 60:.1f} minutes at {found.speed / 1e6:.0f} MB/s "
        "of this disk"
    )
