"""Cuts the moves of a plan into slabs: from Hugging Face tensors into blocks, and from blocks into tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE
from simpo_megatron.checkpoint.parameters import Block, MegatronParameter, StoredParameter
from simpo_megatron.checkpoint.transfer.execute import BUFFERS
from simpo_megatron.checkpoint.transfer.moves import Rect, Slab, Step
from simpo_megatron.models.hf_checkpoint import HFTensor
from simpo_megatron.models.part_layout import parameter_rows, part_rows

LARGEST_SLAB = 64 * 2**20
SMALLEST_SLAB = 2**20


def slab_bytes(max_memory: int, workers: int) -> int:
    """The size of a slab, so that the buffers of all workers stay within `max_memory` bytes.

    A worker has `BUFFERS` slabs in flight, a cast or strided copy of each, and one being read.
    """
    return max(SMALLEST_SLAB, min(LARGEST_SLAB, max_memory // (workers * (2 * BUFFERS + 1))))


def write_step(item: MegatronParameter, blocks: Sequence[Block], sources: Mapping[str, HFTensor], size: int) -> Step:
    """The parts of a parameter into its blocks: every byte of them is read, hashed and written once."""
    slabs = []
    edges = sorted({0, item.rows, *(block.row for block in blocks if block.row < item.rows)})
    for edge, end in pairwise(edges):
        for start, stop in _cut(edge, end, item.row_bytes, size):
            reads, hashed = [], []
            for part, first, last in part_rows(item.weight.part_layout, item.weight.rows, start, stop):
                name, at = item.hf[part], sum(rect.rows * rect.row_bytes for rect in reads)
                source = sources[name]
                reads.append(
                    Rect(
                        str(source.file),
                        source.start + first * item.row_bytes,
                        last - first,
                        item.row_bytes,
                        at,
                        item.row_bytes,
                    )
                )
                hashed.append((name, at, (last - first) * item.row_bytes))
            writes = tuple(_overlap(item, blocks, start, stop, 0))
            slabs.append(Slab((stop - start) * item.row_bytes, tuple(reads), writes, tuple(hashed)))
    return Step(item.name, tuple(slabs))


def read_step(
    item: MegatronParameter,
    part: int,
    tiles: Sequence[Block],
    replicas: Sequence[Block],
    size: int,
    target: tuple[str, int, str] | None = None,
) -> Step:
    """One Hugging Face tensor out of the blocks of its parameter.

    Args:
        item: the parameter.
        part: which of its tensors.
        tiles, replicas: its blocks; replicas are compared where there is no target.
        size: bytes of a slab.
        target: file, first byte and dtype to write; None to read and hash alone.
    """
    name, slabs = item.hf[part], []
    for start, stop in _cut(0, item.weight.shapes[part][0], item.row_bytes, size):
        reads, checks, at = [], [], 0
        for first, last in parameter_rows(item.weight.part_layout, item.weight.rows, part, start, stop):
            reads += _overlap(item, tiles, first, last, at)
            checks += _overlap(item, replicas, first, last, at) if target is None else []
            at += (last - first) * item.row_bytes
        writes, hashed, cast = (), at, None
        if target is not None:
            file, offset, dtype = target
            row_bytes = item.columns * ITEM_SIZE[dtype]
            writes = (Rect(file, offset + start * row_bytes, stop - start, row_bytes, 0, row_bytes),)
            hashed = (stop - start) * row_bytes
            cast = None if dtype == item.dtype else (item.dtype, dtype)
        slabs.append(Slab(at, tuple(reads), writes, ((name, 0, hashed),), tuple(checks), cast))
    return Step(name, tuple(slabs))


def tensor_step(name: str, tensor: HFTensor, size: int) -> Step:
    """One Hugging Face tensor, read and hashed where it lies."""
    row_bytes = ITEM_SIZE[tensor.dtype]
    count = 1
    for dim in tensor.shape:
        count *= dim
    slabs = [
        Slab(
            (stop - start) * row_bytes,
            (Rect(str(tensor.file), tensor.start + start * row_bytes, stop - start, row_bytes, 0, row_bytes),),
            hashed=((name, 0, (stop - start) * row_bytes),),
        )
        for start, stop in _cut(0, count, row_bytes, size)
    ]
    return Step(name, tuple(slabs))


def _overlap(item: MegatronParameter, blocks: Sequence[Block], start: int, stop: int, at: int) -> Iterator[Rect]:
    """What lies of rows `start` to `stop` in which block; `at` is the place of row `start` in the buffer."""
    for block in blocks:
        low, high = max(start, block.row), min(stop, block.row + block.rows)
        if low < high:
            row_bytes = block.columns * item.item_size
            place = at + (low - start) * item.row_bytes + block.column * item.item_size
            yield Rect(
                block.file, block.offset + (low - block.row) * row_bytes, high - low, row_bytes, place, item.row_bytes
            )


def _cut(start: int, stop: int, row_bytes: int, size: int) -> Iterator[tuple[int, int]]:
    step = max(1, size // row_bytes)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def stored_rects(stored: StoredParameter) -> Iterator[Rect]:
    """Where a whole parameter, without its padding, is read from into one buffer."""
    return _overlap(stored.item, stored.tiles, 0, stored.item.rows, 0)
