"""Hugging Face tensors <-> one rank's Megatron parameter. Plain torch; no process group.

A tensor-parallel rank holds whole query groups and the same rows of gate and up, so its slices of the Hugging Face
tensors along `Weight.tp_dim` make its parameter, and the parameter makes the slices: the two functions below are inverse
to each other at any tensor-parallel size, and gathering is concatenating slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from simpo_megatron.models.family import Weight


def rank_slice(size: int, padded: int, rank: int, ranks: int) -> slice:
    """The rows of a dimension of `size`, padded to `padded`, that a rank holds; short or empty where the padding is."""
    share = padded // ranks
    return slice(min(rank * share, size), min((rank + 1) * share, size))


def to_megatron(weight: Weight, parts: Sequence[Tensor], ranks: int = 1) -> Tensor:
    """Joins a rank's slices of the parts into its parameter.

    Args:
        weight: the table's row.
        parts: slices in the order of `weight.hf`, any dtype and device.
        ranks: tensor-parallel ranks the slices were cut for.
    """
    if weight.layout == "copy":
        return parts[0]
    if weight.layout == "gate_up":
        return torch.cat(list(parts))
    return torch.cat([part.unflatten(0, (weight.groups // ranks, -1)) for part in parts], dim=1).flatten(0, 1)


def from_megatron(weight: Weight, parameter: Tensor, ranks: int = 1) -> tuple[Tensor, ...]:
    """Takes a rank's parameter apart into its slices of the parts; views where the layout allows."""
    if weight.layout == "copy":
        return (parameter,)
    if weight.layout == "gate_up":
        return parameter.chunk(2)
    rows = [shape[0] for shape in weight.shapes]
    grouped = parameter.unflatten(0, (weight.groups // ranks, -1))
    sizes = [row * grouped.shape[1] // sum(rows) for row in rows]
    return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))


def part_rows(weight: Weight, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Rows `start` to `stop` of the whole parameter as `(part, first, last)` ranges of rows of its parts, in order."""
    for part, offset, first, last in _runs(weight):
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            yield part, first + low - offset, first + high - offset


def parameter_rows(weight: Weight, part: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows `start` to `stop` of a part as ranges of rows of the whole parameter, in order: the inverse of `part_rows`."""
    for owner, offset, first, last in _runs(weight):
        low, high = max(start, first), min(stop, last)
        if owner == part and low < high:
            yield offset + low - first, offset + high - first


def _runs(weight: Weight) -> Iterator[tuple[int, int, int, int]]:
    """The parameter as runs of rows that one part holds in order: (part, first row in the parameter, rows in the part)."""
    rows = [shape[0] for shape in weight.shapes]
    groups, offset = weight.groups if weight.layout == "qkv" else 1, 0
    for group in range(groups):
        for part, size in enumerate(rows):
            share = size // groups
            yield part, offset, group * share, (group + 1) * share
            offset += share
