"""The plan of a conversion as data: rectangles of bytes, in slabs, in steps, in units with files of their own. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rect:
    """Rows that lie one after the other in a file, and apart by `stride` bytes in a buffer.

    Attributes:
        file: a path to read from, or the name of one of the unit's files to write to.
        offset: the first byte in the file.
        rows, row_bytes: its size; contiguous in the file.
        at: the first byte in the buffer.
        stride: from row to row in the buffer.
    """

    file: str
    offset: int
    rows: int
    row_bytes: int
    at: int
    stride: int


@dataclass(frozen=True, slots=True)
class Slab:
    """One buffer full: filled by `reads`, hashed and emptied by `writes`.

    Attributes:
        size: bytes of the buffer.
        hashed: (tensor, first byte, bytes) in the order in which the tensor's bytes are hashed.
        checks: replicas that must equal the buffer.
        cast: (from, to) dtypes; the writes then lie in the converted buffer.
    """

    size: int
    reads: tuple[Rect, ...]
    writes: tuple[Rect, ...] = ()
    hashed: tuple[tuple[str, int, int], ...] = ()
    checks: tuple[Rect, ...] = ()
    cast: tuple[str, str] | None = None


@dataclass(frozen=True)
class Step:
    """One tensor's slabs; hashes of tensors begin and end within a step."""

    name: str
    slabs: tuple[Slab, ...]

    @property
    def size(self) -> int:
        return sum(slab.size for slab in self.slabs)


@dataclass(frozen=True)
class OutFile:
    """A file to write: its name in the target folder, its size, and the bytes of it that are no tensor's."""

    name: str
    size: int
    fixed: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Unit:
    """Files and the steps that fill them."""

    name: str
    files: tuple[OutFile, ...]
    steps: tuple[Step, ...]

    @property
    def size(self) -> int:
        return sum(step.size for step in self.steps)
