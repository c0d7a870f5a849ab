"""How Hugging Face tensors form one Megatron parameter: the part layout of an entry of the weight table.

The parts of a parameter are Hugging Face tensors, or rows of one. The whole parameter consists of runs of their rows
(`runs`), and tensor parallelism splits every block of its rows (`blocks`) evenly. Loading, export, conversion and
verification need no more. Where a rank holds the same share of every part, its slices of the parts form its parameter
(`join`), which is how adapters are added to it.

A new way to form a parameter is a new class here. The families, the converter and its worker processes import this
module, so torch is imported by `join` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Run(NamedTuple):
    """Consecutive rows of a parameter that are consecutive rows of one part.

    Attributes:
        part: index of the part.
        offset: first row in the parameter.
        first: first row in the part.
        last: the row of the part behind the last one.
    """

    part: int
    offset: int
    first: int
    last: int


class PartLayout(Protocol):
    """How parts form a parameter. In all methods `rows` are the rows of each whole part."""

    @property
    def stride(self) -> int:
        """How many blocks of rows tensor parallelism splits one by one (`set_tensor_model_parallel_attributes`)."""
        ...

    def join(self, parts: Sequence[Tensor], ranks: int = 1, dim: int = 0) -> Tensor:
        """A rank's parameter, from its slices of the parts; any dtype and device.

        Args:
            parts: this rank's slice of every part.
            ranks: tensor-parallel ranks that the parameter is split over.
            dim: the dimension that holds the rows, at least 0; outputs of a parameter have them in the last one.
        """
        ...

    def split(self, parameter: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """The whole parts, from the whole parameter; views where the layout allows it."""
        ...

    def runs(self, rows: Sequence[int]) -> Iterator[Run]:
        """The whole parameter from its first row to its last, as runs of rows of the parts."""
        ...

    def divided(self, rows: Sequence[int]) -> Sequence[int]:
        """The numbers of rows that the tensor-parallel size must divide, where tensor parallelism splits rows."""
        ...

    def blocks(self, rows: Sequence[int]) -> Sequence[int]:
        """Rows of each block that tensor parallelism splits; `torch_dist` may keep each block under its own key."""
        ...


@dataclass(frozen=True)
class Copy:
    """One part, unchanged."""

    @property
    def stride(self) -> int:
        """One block."""
        return 1

    def join(self, parts: Sequence[Tensor], ranks: int = 1, dim: int = 0) -> Tensor:
        """The only part."""
        return parts[0]

    def split(self, parameter: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """The parameter as the only part."""
        return (parameter,)

    def runs(self, rows: Sequence[int]) -> Iterator[Run]:
        """One run over all rows."""
        yield Run(0, 0, 0, rows[0])

    def divided(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows of the part."""
        return rows

    def blocks(self, rows: Sequence[int]) -> Sequence[int]:
        """One block of all rows."""
        return (sum(rows),)


@dataclass(frozen=True)
class QKV:
    """q, k and v, interleaved by query group: `[q_0 .. q_{n-1}, k, v]` for every group.

    Attributes:
        groups: query groups of the whole model, the key and value heads.
    """

    groups: int

    @property
    def stride(self) -> int:
        """One block: every rank holds consecutive groups, or a part of one."""
        return 1

    def join(self, parts: Sequence[Tensor], ranks: int = 1, dim: int = 0) -> Tensor:
        """Interleaves q, k and v of this rank's groups."""
        import torch

        grouped = [part.unflatten(dim, (self.groups // ranks, -1)) for part in parts]
        return torch.cat(grouped, dim=dim + 1).flatten(dim, dim + 1)

    def split(self, parameter: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """q, k and v, each a copy."""
        grouped = parameter.unflatten(0, (self.groups, -1))
        sizes = [size // self.groups for size in rows]
        return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))

    def runs(self, rows: Sequence[int]) -> Iterator[Run]:
        """Three runs for every group."""
        offset = 0
        for group in range(self.groups):
            for part, size in enumerate(rows):
                share = size // self.groups
                yield Run(part, offset, group * share, (group + 1) * share)
                offset += share

    def divided(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows of all parts together."""
        return (sum(rows),)

    def blocks(self, rows: Sequence[int]) -> Sequence[int]:
        """One block of all rows."""
        return (sum(rows),)


@dataclass(frozen=True)
class GateUp:
    """Gate, then up, on every tensor-parallel rank."""

    @property
    def stride(self) -> int:
        """Two blocks: every rank holds a slice of gate and a slice of up."""
        return 2

    def join(self, parts: Sequence[Tensor], ranks: int = 1, dim: int = 0) -> Tensor:
        """This rank's slice of gate, then its slice of up."""
        import torch

        return torch.cat(list(parts), dim=dim)

    def split(self, parameter: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """The two halves, as views."""
        return tuple(parameter.chunk(2))

    def runs(self, rows: Sequence[int]) -> Iterator[Run]:
        """One run over gate, one over up."""
        yield Run(0, 0, 0, rows[0])
        yield Run(1, rows[0], 0, rows[1])

    def divided(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows of gate and those of up."""
        return rows

    def blocks(self, rows: Sequence[int]) -> Sequence[int]:
        """A block of gate and a block of up."""
        return rows


def rank_slice(size: int, padded: int, rank: int, ranks: int) -> slice:
    """What a rank holds of a dimension of `size` that is padded to `padded`; short or empty where the padding is.

    >>> rank_slice(5, 8, 0, 2), rank_slice(5, 8, 1, 2)
    (slice(0, 4, None), slice(4, 5, None))
    """
    share = padded // ranks
    return slice(min(rank * share, size), min((rank + 1) * share, size))


def rank_rows(layout: PartLayout, rows: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int]]:
    """Which rows of the whole parameter a rank holds.

    Args:
        layout: of the parameter.
        rows: of each whole part.
        rank: the tensor-parallel rank.
        ranks: how many there are.

    Returns:
        First row and number of rows, in the order of the rank's own parameter.
    """
    found, start = [], 0
    for size in layout.blocks(rows):
        share = size // ranks
        found.append((start + rank * share, share))
        start += size
    return found


def rank_runs(layout: PartLayout, rows: Sequence[int], rank: int, ranks: int) -> Iterator[Run]:
    """A rank's parameter from its first row to its last; `Run.offset` counts its own rows. Arguments as `rank_rows`.

    >>> [(run.part, run.first, run.last) for run in rank_runs(QKV(1), (4, 2, 2), 1, 2)]  # half of a query group
    [(1, 0, 2), (2, 0, 2)]
    """
    offset = 0
    for start, count in rank_rows(layout, rows, rank, ranks):
        for part, first, last in part_rows(layout, rows, start, start + count):
            yield Run(part, offset, first, last)
            offset += last - first


def same_shares(layout: PartLayout, rows: Sequence[int], ranks: int) -> bool:
    """Whether every rank holds the same share of every part, so that `PartLayout.join` makes its parameter.

    >>> same_shares(QKV(2), (8, 2, 2), 2), same_shares(QKV(2), (8, 2, 2), 4)  # four ranks hold half a query group each
    (True, False)
    """
    held = [0] * len(rows)
    for run in rank_runs(layout, rows, 0, ranks):
        held[run.part] += run.last - run.first
    return held == [size // ranks for size in rows]


def join_ranks(layout: PartLayout, rows: Sequence[int], shards: Sequence[Tensor], dim: int | None) -> Tensor:
    """The whole parameter, with the padding of a vocabulary, from what the tensor-parallel ranks hold of it.

    Args:
        layout: of the parameter.
        rows: of each whole part.
        shards: the parameter of every rank.
        dim: the dimension that tensor parallelism splits; None where every rank holds all of it.
    """
    import torch

    if dim is None:
        return shards[0]
    if dim != 0:
        return torch.cat(list(shards), dim)
    shares = [shards[0].shape[0] * size // sum(rows) for size in layout.blocks(rows)]
    blocks = zip(*(shard.split(shares) for shard in shards), strict=True)
    return torch.cat([share for block in blocks for share in block])


def part_rows(layout: PartLayout, rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Rows `start` to `stop` of the whole parameter, as `(part, first, last)` ranges of rows of its parts, in order."""
    for run in layout.runs(rows):
        low, high = max(start, run.offset), min(stop, run.offset + run.last - run.first)
        if low < high:
            yield run.part, run.first + low - run.offset, run.first + high - run.offset


def parameter_rows(
    layout: PartLayout, rows: Sequence[int], parts: Sequence[int], start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Rows `start` to `stop` of parts that lie one behind the other, as ranges of rows of the parameter, in order.

    >>> list(parameter_rows(QKV(2), (4, 2, 2), (0, 1, 2), 2, 6))  # the rows are q q q q k k v v, the parameter is
    [(4, 6), (2, 3), (6, 7)]
    """
    before = 0  # rows of the parts so far
    for part in parts:
        for run in layout.runs(rows):
            low, high = max(start - before, run.first), min(stop - before, run.last)
            if run.part == part and low < high:
                yield run.offset + low - run.first, run.offset + high - run.first
        before += rows[part]
