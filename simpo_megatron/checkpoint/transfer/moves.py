"""The plan of a conversion as data. No torch.

A `Unit` of work has files and the `TensorMove`s that fill them. A move is cut into `Piece`s that fit a buffer. The
bytes of a piece are read and written as `Rect`s.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rect:
    """`rows` runs of `row_bytes` bytes: contiguous in the file, `stride` bytes apart in the buffer.

    Attributes:
        file: a path to read from, or the name of one of the unit's files to write to.
        offset: the first byte in the file.
        rows: how many runs.
        row_bytes: bytes of one run.
        at: the first byte in the buffer.
        stride: bytes from the start of one run to the start of the next in the buffer.
    """

    file: str
    offset: int
    rows: int
    row_bytes: int
    at: int
    stride: int


@dataclass(frozen=True, slots=True)
class Swap:
    """Reorders the numbers of a whole tensor: the first and the last dimension change places.

    Attributes:
        shape: of the buffer that is read.
        item_size: bytes of a number.
        hashed_before: whether the tensor is hashed as it is read, else as it is written.
    """

    shape: tuple[int, int, int]
    item_size: int
    hashed_before: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """What one buffer holds: it is filled by `reads`, hashed, and written by `writes`.

    Attributes:
        size: bytes that are read into the buffer.
        reads: where its bytes come from.
        writes: where its bytes go; empty where a tensor is only hashed.
        hashed: (tensor, first byte, bytes) in the buffer, in the order of the tensor's bytes.
        checks: copies on other ranks that must equal the buffer.
        swap: how the numbers are reordered; `writes` then refers to the reordered buffer.
        cast: (from, to) dtypes; `hashed` and `writes` then refer to the converted buffer.
    """

    size: int
    reads: tuple[Rect, ...]
    writes: tuple[Rect, ...] = ()
    hashed: tuple[tuple[str, int, int], ...] = ()
    checks: tuple[Rect, ...] = ()
    swap: Swap | None = None
    cast: tuple[str, str] | None = None


@dataclass(frozen=True)
class TensorMove:
    """The pieces of one tensor.

    A move hashes whole tensors, so the journal line behind it has the hash of every one of them.

    Attributes:
        name: of the Megatron parameter that is written, or of the Hugging Face tensor that is written or read.
        pieces: in order.
    """

    name: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class OutFile:
    """A file to write.

    Attributes:
        name: in the target folder.
        size: bytes.
        fixed: (first byte, bytes) of what belongs to no tensor.
    """

    name: str
    size: int
    fixed: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Unit:
    """A unit of work: files, and the moves that fill them. No other unit writes to its files.

    Attributes:
        name: names its journal.
        files: to write; none where tensors are only hashed.
        moves: in the order in which they run.
    """

    name: str
    files: tuple[OutFile, ...]
    moves: tuple[TensorMove, ...]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(move.size for move in self.moves)
