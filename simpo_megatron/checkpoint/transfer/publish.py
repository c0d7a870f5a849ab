"""A conversion from check to publication: what --resume, --overwrite, --shard and --workers mean.

    FOLDER/.NAME.conversion/data/        what becomes FOLDER/NAME, until all of it is there
                            journal/     what is on the disk (see work.py)
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
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.cli import human
from simpo_megatron.checkpoint.transfer.execute import journal_path, read_journal
from simpo_megatron.checkpoint.transfer.moves import Unit
from simpo_megatron.checkpoint.transfer.processes import run_units
from simpo_megatron.checkpoint.transfer.progress import transfer_bar
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write, sync


@dataclass(frozen=True)
class Options:
    """How to run: see `cli.add_conversion_flags`."""

    max_memory: int = 2**30
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Target:
    """Where a conversion goes.

    Attributes:
        root: what --save names.
        final: the folder to publish, `root` or one in it.
        publish: called after it is there; writes what points at it.
        replaceable: whether --overwrite may replace what `root` holds.
    """

    root: Path
    final: Path
    publish: Callable[[], None]
    replaceable: Callable[[], bool]

    @property
    def work(self) -> Path:
        return self.final.with_name(f".{self.final.name}.conversion")

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def old(self) -> Path:
        return self.final.with_name(f".{self.final.name}.old")


def fingerprint(*parts: Any) -> str:
    """What tells one conversion from another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_stamps(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of source files, so that a resumed run notices new ones."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def run(
    units: Sequence[Unit],
    target: Target,
    options: Options,
    identity: str,
    finish: Callable[[Path, dict[str, str]], None],
    label: str,
) -> bool:
    """Runs a plan, or this node's share of it, and publishes when nothing is missing.

    Args:
        units: the whole plan.
        target, options: where and how.
        identity: the `fingerprint` of the plan and its sources.
        finish: called with the folder and the hashes of all tensors; writes what belongs besides the units' files.
        label: for the progress bar.

    Returns:
        Whether the target is published; with several nodes, the others may still be at work.

    Raises:
        UserError: the target is not empty, the disk is full, or what `work.write_unit` raises.
    """
    try:
        if _prepare(target, options, identity):
            _clean_up(target)
            return True
        index, count = options.shard
        mine = units[index::count]
        _check_space(units, target)
        with transfer_bar(label, sum(unit.size for unit in mine)) as report:
            run_units(mine, target.work, options.workers, report)
        return _publish(units, target, finish)
    except OSError as error:
        raise UserError(
            f"{error.filename or target.root} cannot be written: {error.strerror}; free space there or give another "
            "--save, then go on with --resume"
        ) from error


def _prepare(target: Target, options: Options, identity: str) -> bool:
    """Makes the folder to work in; returns whether the target is complete already."""
    if options.overwrite and options.shard[1] > 1:
        raise UserError("--overwrite with --shard would let one node remove what another wrote; empty the folder first")
    _recover(target)
    plan = target.work / "plan.json"
    others = [path for path in _listed(target.root) if path != target.work]
    if options.overwrite:
        if others and not target.replaceable():
            raise UserError(f"--overwrite: {target.root} holds more than a conversion wrote; give another --save")
        shutil.rmtree(target.work, ignore_errors=True)
    elif options.resume and plan.exists() and not target.data.exists() and others:
        _same_plan(plan, identity)
        return True
    elif options.resume and others and (target.final / "conversion.json").exists():
        _same_plan(target.final / "conversion.json", identity)
        return True
    elif others:
        raise UserError(f"--save {target.root} is not empty; give a new folder, or --overwrite to replace a conversion")
    elif target.work.exists() and not options.resume and options.shard[1] == 1:
        raise UserError(f"{target.work} holds an interrupted conversion; --resume goes on, --overwrite starts again")
    (target.work / "journal").mkdir(parents=True, exist_ok=True)
    target.data.mkdir(exist_ok=True)
    if plan.exists():
        _same_plan(plan, identity)
    else:
        atomic_write(plan, json.dumps({"plan": identity}))
    return False


def _recover(target: Target) -> None:
    """Ends the exchange of an old target for a new one that a kill cut in two."""
    if target.old.exists():
        if target.final.exists():
            shutil.rmtree(target.old)
        else:
            os.rename(target.old, target.final)


def _listed(folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save {folder} is a file; give a folder")
    return sorted(folder.iterdir()) if folder.exists() else []


def _same_plan(file: Path, identity: str) -> None:
    try:
        found = json.loads(file.read_text())["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != identity:
        raise UserError(
            f"{file.parent} is of another conversion (other source files, flags or version); --overwrite starts again"
        )


def _check_space(units: Sequence[Unit], target: Target) -> None:
    """Before the first byte: does what is missing fit?"""
    planned = sum(file.size for unit in units for file in unit.files)
    there = sum(
        (target.data / file.name).stat().st_blocks * 512
        for unit in units
        for file in unit.files
        if (target.data / file.name).exists()
    )
    free = shutil.disk_usage(target.work).free
    if planned - there > free:
        raise UserError(
            f"--save {target.root}: {human(planned - there)} are still to be written, but only {human(free)} are free; "
            "free space there, or give another folder"
        )


def _publish(units: Sequence[Unit], target: Target, finish: Callable[[Path, dict[str, str]], None]) -> bool:
    with _locked(target.work / "plan.json") as there:
        if not there:
            return True  # another node was faster
        hashes: dict[str, str] = {}
        for unit in units:
            path = journal_path(target.work, unit.name)
            done, found = read_journal(path)
            if done < len(unit.steps) or not path.exists():
                return False
            hashes |= found
        for torn in target.data.glob(".*.tmp"):  # of a kill in here
            torn.unlink()
        finish(target.data, hashes)
        for file in (*target.data.rglob("*"), target.data):
            sync(file)
        if target.final.exists() and any(target.final.iterdir()):
            os.rename(target.final, target.old)
        os.replace(target.data, target.final)
        sync(target.final.parent)
        _clean_up(target)
    return True


def _clean_up(target: Target) -> None:
    target.publish()
    shutil.rmtree(target.old, ignore_errors=True)
    shutil.rmtree(target.work, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Any:
    """Holds a lock on a file; yields False where it has vanished."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        yield False
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield path.exists()
