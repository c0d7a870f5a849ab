"""Finds the parameters of a torch_dist directory that the converter, the trainer or Megatron-LM wrote.

Optimizer state may be there and is left out. `.metadata` is read by safe_pickle.py, so it can name classes of any
Megatron version, and none of their code runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE, PickledTensor, Record, read_pickle
from simpo_megatron.checkpoint.formats.torch_dist_writer import (
    LAYERS,
    key_of,
    key_of_layer,
    leading_axes,
)
from simpo_megatron.checkpoint.formats.torch_save_file import read_torch_file
from simpo_megatron.checkpoint.parameters import (
    Block,
    MegatronParameter,
    StoredModel,
    StoredParameter,
    model_parameters,
)
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.weight_table import SEPARATE_NORMS

_NO_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine_state", "opt_param_scheduler", "progress")


@dataclass(frozen=True)
class _Chunk:
    """A chunk in `.metadata`: its place in the tensor of its key, and the torch.save file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def read_common(folder: Path) -> dict[str, Any]:
    """What common.pt holds, such as arguments; empty where there is none."""
    path = folder / "common.pt"
    content = read_torch_file(path).content if path.exists() else {}
    return content if isinstance(content, dict) else {}


def args_of(record: Any) -> dict[str, Any]:
    """The arguments of a pickled Namespace that are plain values."""
    values = vars(record) if isinstance(record, Record) else {}
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str, tuple, list))}


def read_torch_dist(folder: Path, hf: HFCheckpoint) -> StoredModel:
    """Finds every parameter of a model.

    Raises:
        UserError: the checkpoint is broken, lacks a parameter or a part of one, or has one that the model does not
        have.
    """
    index = _Index(*_read_index(folder))
    adapters = any(".adapter." in key for key in index.shapes)
    if adapters and not any(".adapter." in entry.megatron for entry in hf.architecture.weights):
        raise UserError(f"{folder} holds adapters and not the weights under them; convert it with tools/adapters.py")
    found = model_parameters(hf, defaultdict(lambda: "F32"))
    parameters = [_find(parameter, index) for parameter in found]
    if unknown := sorted(index.shapes.keys() - index.used):
        raise UserError(
            f"{folder} holds {', '.join(unknown[:5])} ({len(unknown)} in all), which {hf.architecture.family.name} "
            "with this config.json does not have; give the model it was trained from"
        )
    return StoredModel(folder, tuple(parameters), args_of(read_common(folder).get("args")))


def _read_index(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[_Chunk]]]:
    """Shape and chunks of the weights by key."""
    path = folder / ".metadata"
    if not path.is_file():
        raise UserError(f"{folder} has no .metadata; it is not a complete torch_dist checkpoint")
    metadata = read_pickle(path.read_bytes(), path)
    try:
        entries = {
            str(key): entry
            for key, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "chunks") and not str(key).startswith(_NO_WEIGHTS)
        }
        shapes = {key: _integers(entry.size) for key, entry in entries.items()}
        sizes = {
            (key, tuple(chunk.offsets)): _integers(chunk.sizes)
            for key, entry in entries.items()
            for chunk in entry.chunks
        }
        chunks: dict[str, list[_Chunk]] = {key: [] for key in entries}
        for index, place in metadata.storage_data.items():
            if index.fqn in chunks:
                offsets, file = _integers(index.offset), _inside(folder, str(place.relative_path))
                chunk = _Chunk(offsets, sizes[index.fqn, offsets], file, int(place.offset), int(place.length))
                chunks[index.fqn].append(chunk)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a checkpoint ({error!r}); copy it again") from None
    return shapes, chunks


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _inside(folder: Path, name: str) -> Path:
    """A data file. Raises UserError where it is not in the folder."""
    if Path(name).name != name:
        raise UserError(
            f"{folder / '.metadata'} names the file {name!r}, which is not in that folder; do not use this checkpoint"
        )
    if not (folder / name).is_file():
        raise UserError(f"{folder} lacks {name}, which its .metadata names; copy it again")
    return folder / name


class _Index:
    """Shapes and chunks by key, and which keys were asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], chunks: dict[str, list[_Chunk]]) -> None:
        self.shapes, self.chunks = shapes, chunks
        self.used: set[str] = set()
        self._found: dict[tuple[str, int], dict[tuple[int, ...], list[_Chunk]]] = {}

    def chunks_at(self, key: str, index: tuple[int, ...]) -> list[_Chunk]:
        """The chunks that hold an index of the leading axes; made once for all indices of a key."""
        lead = len(index)
        if (key, lead) not in self._found:
            found: dict[tuple[int, ...], list[_Chunk]] = defaultdict(list)
            for chunk in self.chunks[key]:
                ranges = (range(at, at + size) for at, size in zip(chunk.offsets[:lead], chunk.sizes, strict=False))
                for where in product(*ranges):
                    found[where].append(chunk)
            self._found[key, lead] = found
        return self._found[key, lead].get(index, [])


def _candidates(parameter: MegatronParameter) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Keys that may hold a parameter, or rows of it: key, indices of the leading axes, first row, rows."""
    stacked = key_of(parameter.entry)
    keys = [stacked]
    if separate := SEPARATE_NORMS.get(stacked.removeprefix(LAYERS)):
        keys.append(LAYERS + separate)
    index = tuple(index for index, _ in leading_axes(parameter))
    for key in keys:
        yield from _whole_and_halves(parameter, key, index)
        if parameter.entry.per_layer:
            single = key_of_layer(key, parameter.layer)
            yield from _whole_and_halves(parameter, single, index[-1:] if parameter.entry.experts else ())
            if parameter.entry.experts:
                own = single.replace("experts.experts.", f"experts.experts.{parameter.expert}.")
                yield from _whole_and_halves(parameter, own, ())


def _whole_and_halves(
    parameter: MegatronParameter, key: str, index: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """The key itself, and those of gate and up, which Megatron keeps apart where layers are not stacked."""
    yield key, index, 0, parameter.rows
    blocks, row = parameter.entry.part_layout.blocks(parameter.entry.rows), 0
    for suffix, rows in zip(("_w", "_v"), blocks, strict=False) if len(blocks) > 1 else ():
        yield f"{key}{suffix}", index, row, rows
        row += rows


def _find(parameter: MegatronParameter, index: _Index) -> StoredParameter:
    blocks: list[Block] = []
    dtypes: set[str] = set()
    leading = tuple(size for _, size in leading_axes(parameter))
    for key, where, row, rows in _candidates(parameter):
        if key not in index.shapes:
            continue
        index.used.add(key)
        found, lead = index.shapes[key], leading[len(leading) - len(where) :]
        own = found[len(where) :]
        fits = own[1:] == parameter.shape[1:] and (
            own[:1] == (rows,) or (parameter.entry.is_vocabulary and own[0] >= rows)
        )
        if not fits or found[: len(where)] != lead:
            raise UserError(
                f"{key} has shape {list(found)} in the checkpoint, but config.json gives "
                f"{[*lead, rows, *parameter.shape[1:]]}; give the model it was trained from"
            )
        for chunk in index.chunks_at(key, where):
            tensor, start = _tensor_in(chunk)
            dtypes.add(tensor.dtype)
            blocks.append(_block(chunk, where, row, start, ITEM_SIZE[tensor.dtype]))
    if not blocks:
        raise UserError(
            f"the checkpoint has no {parameter.name}, which config.json asks for; give the model it was trained from"
        )
    if len(dtypes) > 1:
        raise UserError(f"{parameter.name} is stored in {' and '.join(sorted(dtypes))}; save it in one dtype")
    return StoredParameter.from_blocks(replace(parameter, dtype=dtypes.pop()), blocks)


def _tensor_in(chunk: _Chunk) -> tuple[PickledTensor, int]:
    """The tensor of a chunk and its first byte in the file."""
    file = read_torch_file(chunk.file, chunk.start, chunk.length)
    tensor = file.content
    if not isinstance(tensor, PickledTensor) or tensor.shape != chunk.sizes:
        raise UserError(
            f"{chunk.file} holds something else at byte {chunk.start} than .metadata describes; copy it again"
        )
    return tensor, file.place(tensor)


def _block(chunk: _Chunk, where: Sequence[int], row: int, start: int, item_size: int) -> Block:
    """The part of a chunk that belongs to the layer and expert at `where`; `row` is the first row of its key."""
    lead, inner = len(where), chunk.sizes[len(where) :]
    before = 0
    for at, first, size in zip(where, chunk.offsets, chunk.sizes, strict=False):
        before = before * size + at - first
    offset = start + before * math.prod(inner) * item_size
    offsets = chunk.offsets[lead:]
    column = offsets[1] if len(offsets) > 1 else 0
    first, rows = offsets[0] if offsets else 0, inner[0] if inner else 1
    return Block(str(chunk.file), offset, row + first, rows, column, math.prod(inner[1:]))
