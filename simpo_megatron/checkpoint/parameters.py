"""Megatron parameters, whole, and the blocks of them that lie in files.

Every parameter is seen as a matrix, [rows, columns], as torch_dist holds it: q, k and v interleaved by query group, gate
above up; a vector has one column. A block is a rectangle of it that lies contiguously in one file: a chunk of torch_dist,
or what one rank holds in the legacy format. Both formats are then lists of blocks, and both directions cut along them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.weight_table import WeightEntry


@dataclass(frozen=True)
class MegatronParameter:
    """One parameter: a row of the weight table, for one layer and one expert."""

    weight: WeightEntry
    layer: int
    expert: int
    dtype: str

    @property
    def name(self) -> str:
        """The canonical name, with the global layer and expert."""
        return self.weight.megatron.format(layer=self.layer, expert=self.expert)

    @property
    def hf(self) -> tuple[str, ...]:
        """The Hugging Face names of its parts."""
        return tuple(part.format(layer=self.layer, expert=self.expert) for part in self.weight.hf)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter, without vocabulary padding."""
        return (sum(shape[0] for shape in self.weight.shapes), *self.weight.shapes[0][1:])

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def item_size(self) -> int:
        return ITEM_SIZE[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.columns * self.item_size

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Block:
    """Rows and columns of a parameter, contiguous in `file` from byte `offset`."""

    file: str
    offset: int
    row: int
    rows: int
    column: int
    columns: int


def model_parameters(hf: HFCheckpoint, dtypes: dict[str, str]) -> Iterator[MegatronParameter]:
    """Every parameter, in the order they are written: embedding, layer by layer, final norm, output.

    Args:
        hf: the model.
        dtypes: of the Hugging Face tensors by name.

    Raises:
        UserError: the parts of one parameter differ in dtype, or one is not a floating-point number.
    """
    table = hf.architecture.weights
    first_layer = next(index for index, weight in enumerate(table) if weight.per_layer)
    head = [weight for weight in table[:first_layer] if not weight.per_layer]
    tail = [weight for weight in table[first_layer:] if not weight.per_layer]
    for weight in head:
        yield _item(weight, 0, 0, dtypes)
    for layer in range(hf.architecture.num_layers):
        for weight in table:
            if weight.per_layer:
                for expert in range(weight.experts or 1):
                    yield _item(weight, layer, expert, dtypes)
    for weight in tail:
        yield _item(weight, 0, 0, dtypes)


def _item(weight: WeightEntry, layer: int, expert: int, dtypes: dict[str, str]) -> MegatronParameter:
    names = [part.format(layer=layer, expert=expert) for part in weight.hf]
    found = {dtypes[name] for name in names}
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(names)} have different dtypes ({', '.join(sorted(found))}); convert them to one"
        )
    dtype = found.pop()
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{names[0]} has dtype {dtype}; only F32, F16 and BF16 weights convert (dequantize them first)")
    return MegatronParameter(weight, layer, expert, dtype)


def split_replicas(
    item: MegatronParameter, blocks: Iterable[Block], padded_rows: int = 0
) -> tuple[list[Block], list[Block]]:
    """Blocks that tile a parameter, and those that repeat one of them.

    Args:
        item: the parameter.
        blocks: of it, in any order.
        padded_rows: rows below the parameter that its blocks may cover besides.

    Raises:
        UserError: the blocks leave a part out, or overlap without being equal.
    """
    seen: dict[tuple[int, int, int, int], Block] = {}
    replicas = []
    for block in blocks:
        key = (block.row, block.rows, block.column, block.columns)
        if key in seen:
            replicas.append(block)
        else:
            seen[key] = block
    tiles = sorted(seen.values(), key=lambda block: (block.row, block.column))
    covered, wanted = sum(block.rows * block.columns for block in tiles), max(item.rows, padded_rows) * item.columns
    # Whole rows in order overlap only with the next; anything else is few blocks.
    whole = all(block.columns == item.columns for block in tiles)
    if covered != wanted or any(_overlap(*two) for two in (pairwise(tiles) if whole else combinations(tiles, 2))):
        raise UserError(
            f"the checkpoint holds {covered} of the {wanted} numbers of {item.name}, or some of them twice; a file or rank "
            "of it is missing"
        )
    return tiles, replicas


def _overlap(one: Block, two: Block) -> bool:
    return max(one.row, two.row) < min(one.row + one.rows, two.row + two.rows) and max(one.column, two.column) < min(
        one.column + one.columns, two.column + two.columns
    )


@dataclass(frozen=True)
class StoredParameter:
    """A parameter in a checkpoint: the blocks that tile it, and the blocks other ranks hold of it besides.

    `padded_rows` counts the rows of the embedding or output layer with their padding.
    """

    item: MegatronParameter
    tiles: tuple[Block, ...]
    replicas: tuple[Block, ...] = ()
    padded_rows: int = 0


def stored(item: MegatronParameter, blocks: Iterable[Block]) -> StoredParameter:
    """Sorts the blocks of a parameter.

    Raises:
        UserError: they leave a part out, or overlap without being equal.
    """
    blocks = list(blocks)
    padded = max((block.row + block.rows for block in blocks), default=0) if item.weight.is_vocabulary else 0
    tiles, replicas = split_replicas(item, blocks, padded)
    return StoredParameter(item, tuple(tiles), tuple(replicas), padded)


@dataclass(frozen=True)
class StoredModel:
    """What a Megatron checkpoint holds of a model.

    Attributes:
        folder: its directory.
        parameters: in the order of `model_parameters`.
        args: the arguments it was saved with, by name; empty where it has none.
    """

    folder: Path
    parameters: tuple[StoredParameter, ...]
    args: dict[str, Any]
