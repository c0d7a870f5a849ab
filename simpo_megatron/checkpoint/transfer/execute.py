"""Runs one unit of a plan: byte ranges from file to file through a few buffers, with hashes and a journal. No torch.

Every unit has files of its own, so units run in any order, in several processes and on several nodes. Within a unit,
one thread reads into a buffer while a second thread hashes and a third writes the buffers read before.

The journal of a unit names the moves whose bytes are on the disk (fdatasync) and the hashes of their tensors. After a
crash the unit resumes after the last journal line; its files were already allocated at full size.
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

from simpo_megatron.checkpoint.transfer.moves import OutFile, Piece, Rect, Swap, TensorMove, Unit
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import sync

SYNC_BYTES = 2 * 2**30  # a journal line at least this often: a crash costs at most so many bytes
BUFFERS = 3
OPEN_FILES = 64

ProgressCallback = Callable[[int], None]  # is called with the bytes moved since the last call


@dataclass
class Outcome:
    """What running a unit found.

    Attributes:
        hashes: the SHA-256 of every tensor by its Hugging Face name.
        differences: replicas that differ, a sentence each.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)


class Files:
    """Open files, those to write in `folder`; beyond `OPEN_FILES` the one not read for the longest time is closed."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.open: OrderedDict[tuple[str, bool], int] = OrderedDict()
        self.lock = threading.Lock()

    @contextmanager
    def descriptor(self, name: str, write: bool) -> Iterator[int]:
        """An open file. Only the thread that reads opens files to read, so none is closed while it is in use."""
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
        """Waits until what was written is on the disk."""
        for (_, write), handle in self.open.items():
            if write:
                os.fdatasync(handle)

    def close(self) -> None:
        """Closes all of them."""
        for handle in self.open.values():
            os.close(handle)
        self.open.clear()


def read_rect(files: Files, rect: Rect, buffer: np.ndarray) -> None:
    """Fills the rows of a buffer from a file.

    Raises:
        UserError: the file ends too early or cannot be read.
    """
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


def _write_rect(files: Files, rect: Rect, buffer: np.ndarray) -> None:
    size = rect.rows * rect.row_bytes
    whole = rect.stride == rect.row_bytes
    data = buffer[rect.at : rect.at + size] if whole else np.ascontiguousarray(_rows(buffer, rect)).reshape(-1)
    view, done = data.data, 0
    with files.descriptor(rect.file, write=True) as handle:
        while done < size:
            done += os.pwrite(handle, view[done:], rect.offset + done)


def _rows(buffer: np.ndarray, rect: Rect) -> np.ndarray:
    """The runs of a rectangle in the buffer, as a view of [rows, row_bytes]."""
    return np.ndarray((rect.rows, rect.row_bytes), np.uint8, buffer, rect.at, (rect.stride, 1))  # type: ignore[call-overload]


class _Runner:
    """The pipeline of one unit: three threads and `BUFFERS` buffers."""

    def __init__(self, unit: Unit, files: Files, progress: ProgressCallback) -> None:
        self.unit, self.files, self.progress = unit, files, progress
        self.largest = max((piece.size for move in unit.moves for piece in move.pieces), default=0)
        self.free: list[np.ndarray] = []
        self.pending: deque[tuple[np.ndarray, int, list[Future[None]]]] = deque()
        self.hashes: dict[str, Any] = {}
        self.differences: list[str] = []

    def run(self, first: int, commit: Callable[[int, dict[str, str]], None]) -> None:
        """Runs the moves from index `first`.

        Args:
            first: how many moves an earlier run has finished.
            commit: called with the number of moves whose bytes are written, and the hashes since the last call.
        """
        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as hasher:
            since = 0
            try:
                for index, move in enumerate(self.unit.moves[first:], first + 1):
                    for piece in move.pieces:
                        self._submit(move, piece, writer, hasher)
                    since += move.size
                    if since >= SYNC_BYTES or index == len(self.unit.moves):
                        self._drain(0)
                        commit(index, {name: state.hexdigest() for name, state in self.hashes.items()})
                        self.hashes, since = {}, 0
            finally:
                # Waits without raising: if there is an error, it is being raised already.
                for future in (future for _, _, futures in self.pending for future in futures):
                    future.exception()

    def _submit(self, move: TensorMove, piece: Piece, writer: ThreadPoolExecutor, hasher: ThreadPoolExecutor) -> None:
        self._drain(BUFFERS - 1)
        buffer = self.free.pop() if self.free else np.empty(self.largest, np.uint8)
        for rect in piece.reads:
            read_rect(self.files, rect, buffer)
        for rect in piece.checks:
            self._check(move, rect, buffer)
        data = read = buffer[: piece.size]
        if piece.swap is not None:
            data = _swapped(read, piece.swap)
        if piece.cast is not None:
            data = _cast(data, *piece.cast)
        hashed = read if piece.swap is not None and piece.swap.hashed_before else data
        futures = [hasher.submit(self._hash, piece, hashed)] if piece.hashed else []
        if piece.writes:
            futures.append(writer.submit(self._write, piece, data))
        self.pending.append((buffer, piece.size, futures))

    def _drain(self, leave: int) -> None:
        """Waits until at most `leave` buffers are still being hashed or written."""
        while len(self.pending) > leave:
            buffer, size, futures = self.pending[0]
            for future in futures:
                future.result()
            self.pending.popleft()
            self.free.append(buffer)
            self.progress(size)

    def _hash(self, piece: Piece, data: np.ndarray) -> None:
        for name, at, size in piece.hashed:
            self.hashes.setdefault(name, hashlib.sha256()).update(data[at : at + size].data)

    def _write(self, piece: Piece, data: np.ndarray) -> None:
        for rect in piece.writes:
            _write_rect(self.files, rect, data)

    def _check(self, move: TensorMove, rect: Rect, buffer: np.ndarray) -> None:
        """Compares a replica with the buffer."""
        copy = np.empty(rect.rows * rect.row_bytes, np.uint8)
        read_rect(self.files, Rect(rect.file, rect.offset, rect.rows, rect.row_bytes, 0, rect.row_bytes), copy)
        if not np.array_equal(_rows(buffer, rect), copy.reshape(rect.rows, rect.row_bytes)):
            self.differences.append(f"{rect.file} holds another {move.name} than the other ranks' files")


def _swapped(data: np.ndarray, swap: Swap) -> np.ndarray:
    """The bytes with their numbers reordered, a copy."""
    numbers = data.view(f"u{swap.item_size}").reshape(swap.shape)
    return np.ascontiguousarray(numbers.swapaxes(0, 2)).reshape(-1).view(np.uint8)


def _cast(data: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bytes of one dtype as bytes of another, rounded to nearest."""
    import torch

    from simpo_megatron.models.dtypes import TORCH

    return torch.from_numpy(data).view(TORCH[source]).to(TORCH[target]).view(torch.uint8).numpy()


def read_unit(unit: Unit, progress: ProgressCallback = lambda _: None) -> Outcome:
    """Runs a unit without files: reads and hashes.

    Raises:
        UserError: a source cannot be read.
    """
    files, hashes = Files(None), {}
    runner = _Runner(unit, files, progress)
    try:
        runner.run(0, lambda _, found: hashes.update(found))
    finally:
        files.close()
    return Outcome(hashes, runner.differences)


def journal_path(folder: Path, unit: str) -> Path:
    """The journal of a unit."""
    return folder / "journal" / f"{unit}.jsonl"


def read_journal(path: Path) -> tuple[int, dict[str, str]]:
    """How many moves are on the disk, and the hashes of their tensors; a last line that a crash cut off is dropped."""
    done, hashes = 0, {}
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            done = entry["steps"]
            hashes |= entry["sha256"]
    return done, hashes


def write_unit(unit: Unit, folder: Path, progress: ProgressCallback = lambda _: None) -> Outcome:
    """Runs a unit from where its journal ends.

    Args:
        unit: what to write.
        folder: has `data` for the files and `journal`.
        progress: is called with the bytes moved.

    Raises:
        UserError: a source cannot be read, the target cannot be written, or another process writes the unit.
    """
    path = journal_path(folder, unit.name)
    try:
        with path.open("ab") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _write_locked(unit, folder, path, journal, progress)
    except BlockingIOError:
        raise UserError(f"another process is writing {folder}; wait for it, or end it") from None
    except OSError as error:
        raise refused(error, folder) from error


def refused(error: OSError, folder: Path) -> UserError:
    """The error for a conversion whose files cannot be written; `folder` is named where the system names no file."""
    return cannot_write(str(error.filename or folder), error, "give another --save", " and go on with --resume")


def _write_locked(unit: Unit, folder: Path, path: Path, journal: Any, progress: ProgressCallback) -> Outcome:
    done, hashes = read_journal(path)
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    progress(sum(move.size for move in unit.moves[:done]))
    if done == len(unit.moves) and path.stat().st_size:
        return Outcome(hashes)
    if not done:
        for file in unit.files:
            _allocate(folder / "data" / file.name, file)
        for parent in {(folder / "data" / file.name).parent for file in unit.files} | {folder / "data", path.parent}:
            sync(parent)  # else a power failure could keep a journal line and lose the name of its file
    files = Files(folder / "data")

    def commit(moves: int, found: dict[str, str]) -> None:
        files.sync()
        # "steps": the journal's word for moves since version 1; a run of an earlier version can be resumed.
        journal.write(json.dumps({"steps": moves, "sha256": found}).encode() + b"\n")
        journal.flush()
        os.fdatasync(journal.fileno())
        hashes.update(found)

    try:
        _Runner(unit, files, progress).run(done, commit)
        if not unit.moves:
            commit(0, {})
    finally:
        files.close()
    return Outcome(hashes)


def _allocate(path: Path, file: OutFile) -> None:
    """Makes a file of full size with the bytes that belong to no tensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(file.size)
        for offset, data in file.fixed:
            stream.seek(offset)
            stream.write(data)
        stream.flush()
        os.fdatasync(stream.fileno())
