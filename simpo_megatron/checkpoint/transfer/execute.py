"""Runs a plan: byte ranges from file to file through a few buffers, hashed on the way and journalled. No torch.

A plan is a list of `Unit`s, each with files of its own, so units run in any order, in several processes, on several nodes.
Within a unit the reading thread fills buffers while one thread hashes and one writes the buffers before.

The journal of a unit names the steps whose bytes are on the disk (fdatasync) and the hashes of their tensors. After a
kill the unit goes on behind the last line; the file it stands in was laid out when the unit began.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simpo_megatron.checkpoint.transfer.moves import OutFile, Rect, Slab, Step, Unit
from simpo_megatron.errors import UserError

SYNC_BYTES = 2 * 2**30  # a journal line at least this often: what a kill costs at most
BUFFERS = 3
OPEN_FILES = 64


@dataclass
class Outcome:
    """What running a unit found: the SHA-256 of every tensor, and replicas that differ, each as a sentence."""

    hashes: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)


Report = Callable[[int], None]


class Files:
    """Open files, the least recently used closed first."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.open: OrderedDict[tuple[str, bool], int] = OrderedDict()
        self.lock = threading.Lock()

    @contextmanager
    def descriptor(self, name: str, write: bool) -> Iterator[int]:
        """An open file; only the thread that reads opens files to read, so none is closed while it is in use."""
        key = (name, write)
        with self.lock:
            if key not in self.open:
                path = str(self.folder / name) if write and self.folder is not None else name
                self.open[key] = os.open(path, os.O_RDWR if write else os.O_RDONLY)
            self.open.move_to_end(key)
            idle = [other for other in self.open if not other[1] and other != key]
            for other in idle[: max(0, len(self.open) - OPEN_FILES)]:
                os.close(self.open.pop(other))
            handle = self.open[key]
        yield handle

    def sync(self) -> None:
        for (_, write), handle in self.open.items():
            if write:
                os.fdatasync(handle)

    def close(self) -> None:
        for handle in self.open.values():
            os.close(handle)
        self.open.clear()


def read_rect(files: Files, rect: Rect, buffer: np.ndarray) -> None:
    """Fills the rows of a buffer from a file."""
    size = rect.rows * rect.row_bytes
    whole = rect.stride == rect.row_bytes
    target = buffer[rect.at : rect.at + size] if whole else np.empty(size, np.uint8)
    view, done = target.data, 0
    try:
        with files.descriptor(rect.file, write=False) as handle:
            while done < size:
                count = os.preadv(handle, [view[done:]], rect.offset + done)
                if not count:
                    raise UserError(f"{rect.file} ends after {rect.offset + done} bytes; copy it again")
                done += count
    except OSError as error:
        raise UserError(f"{rect.file} cannot be read: {error.strerror}; copy it again") from error
    if not whole:
        _rows(buffer, rect)[:] = target.reshape(rect.rows, rect.row_bytes)


def write_rect(files: Files, rect: Rect, buffer: np.ndarray) -> None:
    """Writes the rows of a buffer to a file."""
    size = rect.rows * rect.row_bytes
    whole = rect.stride == rect.row_bytes
    data = buffer[rect.at : rect.at + size] if whole else np.ascontiguousarray(_rows(buffer, rect)).reshape(-1)
    view, done = data.data, 0
    with files.descriptor(rect.file, write=True) as handle:
        while done < size:
            done += os.pwrite(handle, view[done:], rect.offset + done)


def _rows(buffer: np.ndarray, rect: Rect) -> np.ndarray:
    return np.ndarray((rect.rows, rect.row_bytes), np.uint8, buffer, rect.at, (rect.stride, 1))  # type: ignore[call-overload]


class _Runner:
    """The pipeline of one unit: three threads and `BUFFERS` buffers."""

    def __init__(self, unit: Unit, files: Files, report: Report) -> None:
        self.unit, self.files, self.report = unit, files, report
        self.largest = max((slab.size for step in unit.steps for slab in step.slabs), default=0)
        self.free: list[np.ndarray] = []
        self.pending: deque[tuple[np.ndarray, int, list[Future[None]]]] = deque()
        self.hashes: dict[str, Any] = {}
        self.differences: list[str] = []

    def run(self, first: int, commit: Callable[[int, dict[str, str]], None]) -> None:
        """Runs the steps from `first`; `commit(done, hashes)` is called when the bytes of `done` steps are written."""
        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as hasher:
            since = 0
            try:
                for index, step in enumerate(self.unit.steps[first:], first + 1):
                    for slab in step.slabs:
                        self._submit(step, slab, writer, hasher)
                    since += step.size
                    if since >= SYNC_BYTES or index == len(self.unit.steps):
                        self._drain(0)
                        commit(index, {name: state.hexdigest() for name, state in self.hashes.items()})
                        self.hashes, since = {}, 0
            finally:
                wait_all(future for _, _, futures in self.pending for future in futures)

    def _submit(self, step: Step, slab: Slab, writer: ThreadPoolExecutor, hasher: ThreadPoolExecutor) -> None:
        self._drain(BUFFERS - 1)
        buffer = self.free.pop() if self.free else np.empty(self.largest, np.uint8)
        for rect in slab.reads:
            read_rect(self.files, rect, buffer)
        for rect in slab.checks:
            self._check(step, rect, buffer)
        data = buffer[: slab.size] if slab.cast is None else cast(buffer[: slab.size], *slab.cast)
        futures = [hasher.submit(self._hash, slab, data)] if slab.hashed else []
        if slab.writes:
            futures.append(writer.submit(self._write, slab, data))
        self.pending.append((buffer, slab.size, futures))

    def _drain(self, leave: int) -> None:
        while len(self.pending) > leave:
            buffer, size, futures = self.pending[0]
            for future in futures:
                future.result()
            self.pending.popleft()
            self.free.append(buffer)
            self.report(size)

    def _hash(self, slab: Slab, data: np.ndarray) -> None:
        for name, at, size in slab.hashed:
            self.hashes.setdefault(name, hashlib.sha256()).update(data[at : at + size].data)

    def _write(self, slab: Slab, data: np.ndarray) -> None:
        for rect in slab.writes:
            write_rect(self.files, rect, data)

    def _check(self, step: Step, rect: Rect, buffer: np.ndarray) -> None:
        copy = np.empty(rect.rows * rect.row_bytes, np.uint8)
        read_rect(self.files, Rect(rect.file, rect.offset, rect.rows, rect.row_bytes, 0, rect.row_bytes), copy)
        if not np.array_equal(_rows(buffer, rect), copy.reshape(rect.rows, rect.row_bytes)):
            self.differences.append(f"{rect.file} holds another {step.name} than the other ranks' files")


def wait_all(futures: Iterator[Future[None]]) -> None:
    """Waits without raising: the first error is on its way already."""
    for future in futures:
        future.exception()


def cast(data: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bytes of one dtype as bytes of another, rounded to nearest."""
    import torch

    from simpo_megatron.checkpoint.formats.dtypes import TORCH

    return torch.from_numpy(data).view(TORCH[source]).to(TORCH[target]).view(torch.uint8).numpy()


def read_unit(unit: Unit, report: Report = lambda _: None) -> Outcome:
    """Runs a unit without files: reads and hashes."""
    files, outcome = Files(None), Outcome()
    runner = _Runner(unit, files, report)
    try:
        runner.run(0, lambda _, hashes: outcome.hashes.update(hashes))
    finally:
        files.close()
    outcome.differences = runner.differences
    return outcome


def journal_path(folder: Path, unit: str) -> Path:
    """The journal of a unit."""
    return folder / "journal" / f"{unit}.jsonl"


def read_journal(path: Path) -> tuple[int, dict[str, str]]:
    """Steps that are on the disk, and the hashes of their tensors; a torn last line is dropped."""
    steps, hashes = 0, {}
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            steps = entry["steps"]
            hashes |= entry["sha256"]
    return steps, hashes


def write_unit(unit: Unit, folder: Path, report: Report = lambda _: None) -> Outcome:
    """Runs a unit from where its journal ends.

    Raises:
        UserError: a source cannot be read, the target cannot be written, or another process writes the unit.
    """
    path = journal_path(folder, unit.name)
    try:
        with path.open("ab") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _write_locked(unit, folder, path, journal, report)
    except BlockingIOError:
        raise UserError(f"another process is writing {folder}; wait for it, or end it") from None
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror}; free space there or give another --save, "
            "then go on with --resume"
        ) from error


def _write_locked(unit: Unit, folder: Path, path: Path, journal: Any, report: Report) -> Outcome:
    done, hashes = read_journal(path)
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    report(sum(step.size for step in unit.steps[:done]))
    if done == len(unit.steps) and path.stat().st_size:
        return Outcome(hashes)
    if not done:
        for file in unit.files:
            _lay_out(folder / "data" / file.name, file)
    files = Files(folder / "data")

    def commit(steps: int, found: dict[str, str]) -> None:
        files.sync()
        journal.write(json.dumps({"steps": steps, "sha256": found}).encode() + b"\n")
        journal.flush()
        os.fdatasync(journal.fileno())
        hashes.update(found)

    try:
        _Runner(unit, files, report).run(done, commit)
        if not unit.steps:
            commit(0, {})
    finally:
        files.close()
    return Outcome(hashes)


def _lay_out(path: Path, file: OutFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(file.size)
        for offset, data in file.fixed:
            stream.seek(offset)
            stream.write(data)
        stream.flush()
        os.fdatasync(stream.fileno())
