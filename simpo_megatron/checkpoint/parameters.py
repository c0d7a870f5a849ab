"""Whole Megatron parameters, and the blocks of them that are in files.

Every parameter is seen as a matrix [rows, columns], as torch_dist holds it: q, k and v interleaved by query group, gate
above up. A vector has one column. A block is a rectangle of it that is contiguous in one file: a chunk of torch_dist,
or what one rank holds in the `torch` format. Both formats are lists of blocks, and both directions cut along them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE
from simpo_megatron.checkpoint.transfer.moves import OutFile
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.part_layout import parameter_rows
from simpo_megatron.models.weight_table import WeightEntry


@dataclass(frozen=True)
class MegatronParameter:
    """One parameter: an entry of the weight table, for one layer and one expert.

    Attributes:
        entry: of the weight table.
        layer: counted over all stages; 0 where the entry has no layer.
        expert: counted over all ranks; 0 where the entry has no expert.
        dtype: by the name of safetensors, such as "BF16".
        stacked: how many layers torch_dist stacks along a leading axis, all of the model; None where they differ and
            each has keys of its own (`TransformerBlock.sharded_state_dict`), and outside the layers.
    """

    entry: WeightEntry
    layer: int
    expert: int
    dtype: str
    stacked: int | None

    @property
    def name(self) -> str:
        """The canonical name, with the global layer and expert."""
        return self.entry.megatron.format(layer=self.layer, expert=self.expert)

    @property
    def hf(self) -> tuple[str, ...]:
        """The Hugging Face tensor of each of its parts."""
        return tuple(part.format(layer=self.layer, expert=self.expert) for part in self.entry.hf)

    def rows_of(self, tensor: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows `start` to `stop` of one of `WeightEntry.tensors`, as ranges of rows of the matrix, in order."""
        return parameter_rows(self.entry.part_layout, self.entry.rows, tensor, start, stop)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter, without vocabulary padding."""
        return (sum(shape[0] for shape in self.entry.shapes), *self.entry.shapes[0][1:])

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Of the matrix."""
        return math.prod(self.shape[1:])

    @property
    def item_size(self) -> int:
        """Bytes of a number."""
        return ITEM_SIZE[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.columns * self.item_size

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Block:
    """`rows` rows and `columns` columns of a parameter, contiguous in a file.

    Attributes:
        file: a path, or a name in a folder that is being written.
        offset: the first byte in the file.
        row: the first row.
        rows: how many.
        column: the first column.
        columns: how many.
    """

    file: str
    offset: int
    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True)
class FileSet:
    """Files that are written together, and what they hold: a .distcp file, or the rank files of a pipeline stage.

    Attributes:
        name: of the unit of work.
        files: with everything but the bytes of tensors.
        blocks: by the canonical name of their parameter.
    """

    name: str
    files: tuple[OutFile, ...]
    blocks: dict[str, list[Block]]


def model_parameters(hf: HFCheckpoint, dtypes: dict[str, str]) -> Iterator[MegatronParameter]:
    """Every parameter, in the order they are written: embedding, layer by layer, final norm, output.

    Args:
        hf: the model.
        dtypes: of the Hugging Face tensors by name.

    Raises:
        UserError: the parts of one parameter differ in dtype, or one is not a floating-point number.
    """
    table, num_layers = hf.architecture.weights, hf.architecture.num_layers
    stacked = num_layers if all(entry.layers is None for entry in table) else None
    first_layer = next(index for index, entry in enumerate(table) if entry.per_layer)
    head = [entry for entry in table[:first_layer] if not entry.per_layer]
    tail = [entry for entry in table[first_layer:] if not entry.per_layer]
    for entry in head:
        yield _parameter(entry, 0, 0, None, dtypes)
    for layer in range(num_layers):
        for entry in table:
            if entry.in_layer(layer):
                for expert in range(entry.experts or 1):
                    yield _parameter(entry, layer, expert, stacked, dtypes)
    for entry in tail:
        yield _parameter(entry, 0, 0, None, dtypes)


def _parameter(
    entry: WeightEntry, layer: int, expert: int, stacked: int | None, dtypes: dict[str, str]
) -> MegatronParameter:
    names = [part.format(layer=layer, expert=expert) for part in entry.hf]
    found = {dtypes[name] for name in names}
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(names)} have different dtypes ({', '.join(sorted(found))}); convert them to one"
        )
    dtype = found.pop()
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{names[0]} has dtype {dtype}; only F32, F16 and BF16 weights convert (dequantize them first)")
    return MegatronParameter(entry, layer, expert, dtype, stacked)


@dataclass(frozen=True)
class StoredParameter:
    """A parameter in a checkpoint.

    Attributes:
        parameter: with the dtype that it is stored in.
        tiles: the blocks that cover it, each number once.
        replicas: blocks that repeat a tile: what further ranks hold.
    """

    parameter: MegatronParameter
    tiles: tuple[Block, ...]
    replicas: tuple[Block, ...] = ()

    @classmethod
    def from_blocks(cls, parameter: MegatronParameter, blocks: Iterable[Block]) -> StoredParameter:
        """Sorts the blocks of a parameter, in any order, into tiles and replicas.

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
        rows = parameter.rows
        if parameter.entry.is_vocabulary:  # padding included
            rows = max((rows, *(block.row + block.rows for block in tiles)))
        covered, wanted = sum(block.rows * block.columns for block in tiles), rows * parameter.columns
        if covered != wanted or any(_overlap(*two) for two in _neighbours(tiles, parameter.columns)):
            raise UserError(
                f"the blocks of {parameter.name} have {covered} numbers and must cover its {wanted} once each; a file "
                "or rank of the checkpoint is missing, copy it again"
            )
        return cls(parameter, tuple(tiles), tuple(replicas))


def _neighbours(tiles: list[Block], columns: int) -> Iterable[tuple[Block, Block]]:
    """Every two tiles that could overlap. Tiles of whole rows overlap only with the next; others are few."""
    whole = all(tile.columns == columns for tile in tiles)
    return pairwise(tiles) if whole else combinations(tiles, 2)


def _overlap(one: Block, two: Block) -> bool:
    return max(one.row, two.row) < min(one.row + one.rows, two.row + two.rows) and max(one.column, two.column) < min(
        one.column + one.columns, two.column + two.columns
    )


@dataclass(frozen=True)
class StoredModel:
    """What a Megatron checkpoint holds of a model.

    Attributes:
        folder: of one iteration.
        parameters: in the order of `model_parameters`.
        args: the arguments it was saved with, by name; empty where it has none.
    """

    folder: Path
    parameters: tuple[StoredParameter, ...]
    args: dict[str, Any]
