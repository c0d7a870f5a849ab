"""Cuts the move of a tensor into pieces that fit a buffer: into blocks, from blocks, or to a hash alone. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE
from simpo_megatron.checkpoint.parameters import Block, MegatronParameter, StoredParameter
from simpo_megatron.checkpoint.transfer.execute import BUFFERS
from simpo_megatron.checkpoint.transfer.moves import Piece, Rect, Swap, TensorMove
from simpo_megatron.disk import human
from simpo_megatron.errors import UserError
from simpo_megatron.models.weight_files import HFTensor

LARGEST_PIECE = 64 * 2**20  # of a tensor that can be cut
SMALLEST_PIECE = 2**20


def piece_bytes(max_memory: int, workers: int) -> int:
    """The size of a piece, so that the buffers of all workers stay within `max_memory` bytes.

    A worker has `BUFFERS` pieces in flight, one copy of each (strided, reordered, or in another dtype), and one piece
    being read.

    Raises:
        UserError: `max_memory` has no room for pieces of `SMALLEST_PIECE` bytes.
    """
    held = workers * (2 * BUFFERS + 1)
    if max_memory < held * SMALLEST_PIECE:
        raise UserError(
            f"--max-memory {human(max_memory)} is too little for {workers} workers; give at least "
            f"{math.ceil(held * SMALLEST_PIECE / 2**20)}MiB"
        )
    return max_memory // held


def plan_into_blocks(
    parameter: MegatronParameter, blocks: Sequence[Block], sources: Mapping[str, HFTensor], size: int
) -> TensorMove:
    """Hugging Face tensors into the blocks of their parameter: every byte is read, hashed and written once.

    Args:
        parameter: what the tensors form.
        blocks: of the parameter, in the files of one unit.
        sources: the Hugging Face tensors by name.
        size: bytes of a piece at most.
    """
    pieces = []
    for tensor in parameter.entry.tensors:
        name, row_bytes = parameter.hf[tensor[0]], parameter.row_bytes
        source = sources[name]
        for start, stop in _pieces(parameter, tensor, size):
            length = (stop - start) * row_bytes
            read = Rect(str(source.file), source.start + start * row_bytes, stop - start, row_bytes, 0, row_bytes)
            writes, at = [], 0
            for first, last in parameter.rows_of(tensor, start, stop):
                writes += _overlap(parameter, blocks, first, last, at)
                at += (last - first) * row_bytes
            swap = _swap(parameter, tensor, into_blocks=True)
            pieces.append(Piece(length, (read,), tuple(writes), ((name, 0, length),), swap=swap))
    return TensorMove(parameter.name, tuple(pieces))


def plan_from_blocks(
    stored: StoredParameter, tensor: tuple[int, ...], size: int, target: tuple[str, int, str] | None = None
) -> TensorMove:
    """One Hugging Face tensor from the blocks of its parameter.

    Args:
        stored: the parameter with its blocks. Replicas are compared where there is no target.
        tensor: which of its tensors (`WeightEntry.tensors`).
        size: bytes of a piece at most.
        target: file, first byte and dtype to write; None to read and hash alone.
    """
    parameter = stored.parameter
    name, pieces = parameter.hf[tensor[0]], []
    for start, stop in _pieces(parameter, tensor, size):
        reads, checks, at = [], [], 0
        for first, last in parameter.rows_of(tensor, start, stop):
            reads += _overlap(parameter, stored.tiles, first, last, at)
            checks += _overlap(parameter, stored.replicas, first, last, at) if target is None else []
            at += (last - first) * parameter.row_bytes
        writes, hashed, cast = (), at, None
        if target is not None:
            file, offset, dtype = target
            row_bytes = parameter.columns * ITEM_SIZE[dtype]
            writes = (Rect(file, offset + start * row_bytes, stop - start, row_bytes, 0, row_bytes),)
            hashed = (stop - start) * row_bytes
            cast = None if dtype == parameter.dtype else (parameter.dtype, dtype)
        swap = _swap(parameter, tensor, into_blocks=False)
        pieces.append(Piece(at, tuple(reads), writes, ((name, 0, hashed),), tuple(checks), swap, cast))
    return TensorMove(name, tuple(pieces))


def _pieces(parameter: MegatronParameter, tensor: tuple[int, ...], size: int) -> Iterator[tuple[int, int]]:
    """The rows of every piece of a tensor. One that is reordered is one piece.

    Raises:
        UserError: it is, and has more than `size` bytes.
    """
    rows = sum(parameter.entry.rows[part] for part in tensor)
    if not parameter.entry.transposed:
        return _row_ranges(0, rows, parameter.row_bytes, size)
    if rows * parameter.row_bytes > size:
        raise UserError(
            f"{parameter.hf[tensor[0]]} is read whole, with {human(rows * parameter.row_bytes)}, and --max-memory "
            f"leaves {human(size)} for each buffer; raise it, or use fewer --workers"
        )
    return iter([(0, rows)])


def _swap(parameter: MegatronParameter, tensor: tuple[int, ...], *, into_blocks: bool) -> Swap | None:
    """How `WeightEntry.rows_first`, or its inverse, reorders a tensor."""
    if not parameter.entry.transposed:
        return None
    columns, rows, parts = parameter.entry.stored_axes(tensor)
    shape = (columns, rows, parts) if into_blocks else (parts, rows, columns)
    return Swap(shape, parameter.item_size, hashed_before=into_blocks)


def plan_hash(name: str, tensor: HFTensor, size: int) -> TensorMove:
    """One Hugging Face tensor, read and hashed in the file that holds it; `size` bytes a piece at most."""
    item, file = ITEM_SIZE[tensor.dtype], str(tensor.file)
    pieces = []
    for start, stop in _row_ranges(0, math.prod(tensor.shape), item, size):
        length = (stop - start) * item
        reads = (Rect(file, tensor.start + start * item, stop - start, item, 0, item),)
        pieces.append(Piece(length, reads, hashed=((name, 0, length),)))
    return TensorMove(name, tuple(pieces))


def whole_parameter(stored: StoredParameter) -> Iterator[Rect]:
    """The reads that fill one buffer with a parameter, without its padding."""
    return _overlap(stored.parameter, stored.tiles, 0, stored.parameter.rows, 0)


def _overlap(parameter: MegatronParameter, blocks: Sequence[Block], start: int, stop: int, at: int) -> Iterator[Rect]:
    """What each block holds of rows `start` to `stop`; row `start` is at byte `at` of the buffer."""
    for block in blocks:
        low, high = max(start, block.row), min(stop, block.row + block.rows)
        if low < high:
            row_bytes = block.columns * parameter.item_size
            place = at + (low - start) * parameter.row_bytes + block.column * parameter.item_size
            offset = block.offset + (low - block.row) * row_bytes
            yield Rect(block.file, offset, high - low, row_bytes, place, parameter.row_bytes)


def _row_ranges(start: int, stop: int, row_bytes: int, size: int) -> Iterator[tuple[int, int]]:
    """Rows `start` to `stop` in ranges of at most `size` and `LARGEST_PIECE` bytes, or of one row."""
    count = max(1, min(size, LARGEST_PIECE) // row_bytes)
    for first in range(start, stop, count):
        yield first, min(first + count, stop)
