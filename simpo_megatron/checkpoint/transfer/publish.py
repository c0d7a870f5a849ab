"""A conversion from its checks to its publication: what --resume, --overwrite, --shard and --workers mean.

    FOLDER/.NAME.conversion/data/        becomes FOLDER/NAME when all of it is there
                            journal/     what is on the disk (see execute.py)
                            plan.json    what is being converted; a resumed run must want the same

One rename of `data` publishes, so a conversion that was cut off never looks complete. With several nodes, the one that
finishes last publishes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from simpo_megatron.checkpoint.transfer.execute import journal_path, read_journal, refused
from simpo_megatron.checkpoint.transfer.moves import Unit
from simpo_megatron.checkpoint.transfer.processes import run_units
from simpo_megatron.disk import free_bytes, human
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write, sync


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        max_memory: bytes of the buffers of all workers together.
        workers: processes on this node.
        shard: (i, n) for the share i of n, counted from 0, that this node does.
        resume: go on with an interrupted conversion.
        overwrite: replace what an earlier conversion wrote.
    """

    max_memory: int = 2**30
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    resume: bool = False
    overwrite: bool = False


class PlanLine(NamedTuple):
    """What --plan prints of one tensor: where it is, where it goes, bytes and dtype."""

    source: str
    target: str
    size: int
    dtype: str


@dataclass(frozen=True)
class Conversion:
    """One conversion, planned: what is written, where, and what completes it.

    Attributes:
        units: all of the work.
        lines: what --plan prints.
        root: what --save names.
        final: the folder to publish: `root`, or one in it.
        record: the JSON file of `final` with the identity under "plan".
        identity: called before the first byte; returns the `fingerprint` of the plan and its sources.
        finish: called when all units are written, with the folder, the SHA-256 of every tensor and the identity. It
            writes the files that are in no unit.
        publish: called when `final` is complete; writes what points at it.
        replaceable: whether --overwrite may replace what `root` holds.
    """

    units: tuple[Unit, ...]
    lines: tuple[PlanLine, ...]
    root: Path
    final: Path
    record: str
    identity: Callable[[], str]
    finish: Callable[[Path, dict[str, str], str], None]
    publish: Callable[[], None]
    replaceable: Callable[[], bool]

    @property
    def work(self) -> Path:
        """The folder of the work in progress."""
        return self.final.with_name(f".{self.final.name}.conversion")

    @property
    def data(self) -> Path:
        """What becomes `final`."""
        return self.work / "data"

    @property
    def plan(self) -> Path:
        """The file with the identity. It exists while somebody works, and is the lock of the publication."""
        return self.work / "plan.json"

    @property
    def old(self) -> Path:
        """Where an --overwrite keeps the earlier folder until the new one has its name."""
        return self.final.with_name(f".{self.final.name}.old")


def fingerprint(*parts: Any) -> str:
    """A hash of what distinguishes one conversion from another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_stamps(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of source files, so that a resumed run notices other ones."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def run(conversion: Conversion, options: Options) -> bool:
    """Runs a conversion, or this node's share of it, and publishes when nothing is missing.

    Returns:
        Whether it is published. With several nodes, the others may still be at work.

    Raises:
        UserError: the target is not empty, the disk is full, or what `run_units` raises.
    """
    identity = conversion.identity()
    try:
        if _prepare(conversion, options, identity):
            _clean_up(conversion)
            return True
        index, count = options.shard
        run_units(conversion.units[index::count], conversion.work, options.workers, f"to {conversion.final}")
        return _publish(conversion, identity)
    except OSError as error:
        raise refused(error, conversion.root) from error


def _prepare(conversion: Conversion, options: Options, identity: str) -> bool:
    """Makes the folder to work in; returns whether the target is complete already.

    Raises:
        UserError: the target is not empty, or the disk has no room. No folder is left that was not there before.
    """
    if options.overwrite and options.shard[1] > 1:
        raise UserError("--overwrite with --shard would let one node remove what another wrote; empty the folder first")
    _complete_exchange(conversion)
    root, work = conversion.root, conversion.work
    others = [path for path in _listed(root) if path != work]
    if options.overwrite:
        if others and not conversion.replaceable():
            raise UserError(
                f"--overwrite: --save {root} holds files that this program did not write, or that were changed since; "
                "give another --save, or remove the folder"
            )
        shutil.rmtree(work, ignore_errors=True)
    elif others:
        published = _published_as(conversion) if options.resume else None
        if published is None:
            raise UserError(f"--save {root} is not empty; give a new folder, or --overwrite to replace a conversion")
        _check_identity(published, identity)
        return True
    elif work.exists() and not options.resume and options.shard[1] == 1:
        raise UserError(f"{work} holds an interrupted conversion; --resume goes on, --overwrite starts again")
    check_space(conversion)
    absent = [path for path in (work, *work.parents) if not path.exists()]
    try:
        (work / "journal").mkdir(parents=True, exist_ok=True)
        conversion.data.mkdir(exist_ok=True)
        if conversion.plan.exists():
            _check_identity(conversion.plan, identity)
        else:
            atomic_write(conversion.plan, json.dumps({"plan": identity}))
    except OSError:
        if work in absent and options.shard[1] == 1:  # other nodes may be at work in it
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):
                for path in absent[1:]:
                    path.rmdir()
        raise
    return False


def _complete_exchange(conversion: Conversion) -> None:
    """Completes an --overwrite that was killed between its two renames."""
    if conversion.old.exists():
        if conversion.final.exists():
            shutil.rmtree(conversion.old)
        else:
            os.rename(conversion.old, conversion.final)


def _published_as(conversion: Conversion) -> Path | None:
    """The file with the identity of the conversion that has been published; None where none has."""
    if conversion.plan.exists() and not conversion.data.exists():
        return conversion.plan  # killed after the rename of `data`
    record = conversion.final / conversion.record
    return record if record.exists() else None


def _listed(folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save {folder} is a file; give a folder")
    return sorted(folder.iterdir()) if folder.exists() else []


def _check_identity(file: Path, identity: str) -> None:
    try:
        found = json.loads(file.read_text())["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != identity:
        raise UserError(
            f"{file.parent} is of another conversion (other source files, flags or version); --overwrite starts again"
        )


def check_space(conversion: Conversion) -> int:
    """Makes sure, before the first byte, that what is still to be written fits. It counts what all nodes write.

    Returns:
        Bytes that are free where the conversion goes.

    Raises:
        UserError: less is free than is still to be written.
    """
    files = [file for unit in conversion.units for file in unit.files]
    written = [conversion.data / file.name for file in files if (conversion.data / file.name).exists()]
    missing = sum(file.size for file in files) - sum(path.stat().st_blocks * 512 for path in written)
    free = free_bytes(conversion.work)
    if missing > free:
        raise UserError(
            f"--save {conversion.root}: {human(missing)} are still to be written, but only {human(free)} are free; "
            "free space there, or give another folder"
        )
    return free


def _publish(conversion: Conversion, identity: str) -> bool:
    """Completes and renames the folder if every journal is complete; returns whether it is published."""
    with _locked(conversion.plan) as there:
        if not there:
            return True  # another node has published
        hashes: dict[str, str] = {}
        for unit in conversion.units:
            path = journal_path(conversion.work, unit.name)
            done, found = read_journal(path)
            if done < len(unit.moves) or not path.exists():
                return False
            hashes |= found
        for cut_off in conversion.data.glob(".*.tmp"):  # by a kill during an earlier `finish`
            cut_off.unlink()
        conversion.finish(conversion.data, hashes, identity)
        for file in (*conversion.data.rglob("*"), conversion.data):
            sync(file)
        if conversion.final.exists() and any(conversion.final.iterdir()):
            os.rename(conversion.final, conversion.old)
        os.replace(conversion.data, conversion.final)
        sync(conversion.final.parent)
        _clean_up(conversion)
    return True


def _clean_up(conversion: Conversion) -> None:
    conversion.publish()
    shutil.rmtree(conversion.old, ignore_errors=True)
    shutil.rmtree(conversion.work, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds a lock on a file; yields False where the file is gone."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        yield False
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield path.exists()
