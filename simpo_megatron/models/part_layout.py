"""How Hugging Face tensors form one Megatron parameter: an object an entry of the weight table, with all that depends on it.

The parts of a parameter are Hugging Face tensors. A tensor-parallel rank holds whole query groups, and the same rows of gate
and up. So its slices of the parts along `WeightEntry.tp_dim` make its parameter (`join`), and the parameter makes the slices
(`split`): the two are inverse to each other at any tensor-parallel size, and gathering is concatenating slices.

A new way to form a parameter is a class here. No torch is imported: the families, the converter and its workers read this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Run(NamedTuple):
    """Rows of a parameter that one part holds in order.

    Attributes:
        part: index of the part.
        offset: first row in the parameter.
        first, last: the rows of the part, `last` not included.
    """

    part: int
    offset: int
    first: int
    last: int


class PartLayout(Protocol):
    """How parts form a parameter. `rows` are the rows of each whole part."""

    @property
    def stride(self) -> int:
        """Blocks of rows that tensor parallelism splits one by one (`set_tensor_model_parallel_attributes`)."""
        ...

    def join(self, parts: Sequence[Tensor], ranks: int = 1) -> Tensor:
        """A rank's parameter from its slices of the parts, any dtype and device."""
        ...

    def split(self, parameter: Tensor, rows: Sequence[int], ranks: int = 1) -> tuple[Tensor, ...]:
        """A rank's slices of the parts from its parameter; views where the layout allows."""
        ...

    def runs(self, rows: Sequence[int]) -> Iterator[Run]:
        """The whole parameter from its first row to its last."""
        ...

    def divided(self, rows: Sequence[int]) -> Sequence[int]:
        """The numbers that the tensor-parallel size must divide where tensor parallelism splits rows."""
        ...

    def blocks(self, rows: Sequence[int]) -> Sequence[int]:
        """Rows of the blocks that tensor parallelism splits one by one; `torch_dist` may keep each under a key of its own."""
        ...


@dataclass(frozen=True)
class Copy:
    """One part, as it is."""

    @property
    def stride(self) -> int:
        return 1

    def join(self, parts: Sequence[Tensor], ranks: int = 1) -> Tensor:
        return parts[0]

    def split(self, parameter: Tensor, rows: Sequence[int], ranks: int = 1) -> tuple[Tensor, ...]:
        return (parameter,)

    def runs(self, rows: Sequence[int]) -> Iterator[Run]:
        yield Run(0, 0, 0, rows[0])

    def divided(self, rows: Sequence[int]) -> Sequence[int]:
        return rows

    def blocks(self, rows: Sequence[int]) -> Sequence[int]:
        return (sum(rows),)


@dataclass(frozen=True)
class QKV:
    """q, k and v interleaved by query group: `[q_0 .. q_{n-1}, k, v]` for every group."""

    groups: int

    @property
    def stride(self) -> int:
        return 1

    def join(self, parts: Sequence[Tensor], ranks: int = 1) -> Tensor:
        import torch

        return torch.cat([part.unflatten(0, (self.groups // ranks, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, parameter: Tensor, rows: Sequence[int], ranks: int = 1) -> tuple[Tensor, ...]:
        grouped = parameter.unflatten(0, (self.groups // ranks, -1))
        sizes = [size * grouped.shape[1] // sum(rows) for size in rows]
        return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))

    def runs(self, rows: Sequence[int]) -> Iterator[Run]:
        offset = 0
        for group in range(self.groups):
            for part, size in enumerate(rows):
                share = size // self.groups
                yield Run(part, offset, group * share, (group + 1) * share)
                offset += share

    def divided(self, rows: Sequence[int]) -> Sequence[int]:
        return (sum(rows),)

    def blocks(self, rows: Sequence[int]) -> Sequence[int]:
        return (sum(rows),)


@dataclass(frozen=True)
class GateUp:
    """Gate, then up, on every tensor-parallel rank."""

    @property
    def stride(self) -> int:
        return 2

    def join(self, parts: Sequence[Tensor], ranks: int = 1) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def split(self, parameter: Tensor, rows: Sequence[int], ranks: int = 1) -> tuple[Tensor, ...]:
        return tuple(parameter.chunk(2))

    def runs(self, rows: Sequence[int]) -> Iterator[Run]:
        yield Run(0, 0, 0, rows[0])
        yield Run(1, rows[0], 0, rows[1])

    def divided(self, rows: Sequence[int]) -> Sequence[int]:
        return rows

    def blocks(self, rows: Sequence[int]) -> Sequence[int]:
        return rows


def rank_slice(size: int, padded: int, rank: int, ranks: int) -> slice:
    """The rows of a dimension of `size`, padded to `padded`, that a rank holds; short or empty where the padding is."""
    share = padded // ranks
    return slice(min(rank * share, size), min((rank + 1) * share, size))


def rank_rows(layout: PartLayout, rows: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int]]:
    """First row and number of rows of the whole parameter that a rank holds, in the order of its own parameter."""
    found, start = [], 0
    for size in layout.blocks(rows):
        share = size // ranks
        found.append((start + rank * share, share))
        start += size
    return found


def part_rows(layout: PartLayout, rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Rows `start` to `stop` of the whole parameter as `(part, first, last)` ranges of rows of its parts, in order."""
    for run in layout.runs(rows):
        low, high = max(start, run.offset), min(stop, run.offset + run.last - run.first)
        if low < high:
            yield run.part, run.first + low - run.offset, run.first + high - run.offset


def parameter_rows(
    layout: PartLayout, rows: Sequence[int], part: int, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Rows `start` to `stop` of a part as ranges of rows of the whole parameter, in order: the inverse of `part_rows`."""
    for run in layout.runs(rows):
        low, high = max(start, run.first), min(stop, run.last)
        if run.part == part and low < high:
            yield run.offset + low - run.first, run.offset + high - run.first
