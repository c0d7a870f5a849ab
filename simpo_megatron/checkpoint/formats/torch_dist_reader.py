"""Finds the parameters of a torch_dist directory: ours, our trainer's or Megatron-LM's, with optimizer state or without.

`.metadata` is read by `pickles.py`, so it can name classes of any Megatron version and run none of their code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE, Record, StoredTensor, read_pickle
from simpo_megatron.checkpoint.formats.torch_dist_writer import NORM_BEFORE_EXPERTS, NORM_BEFORE_MLP, axes, key_of
from simpo_megatron.checkpoint.formats.torch_save_file import read_torch_file
from simpo_megatron.checkpoint.parameters import (
    Block,
    MegatronParameter,
    StoredModel,
    StoredParameter,
    model_parameters,
    stored,
)
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint

_LAYERS = "decoder.layers."
_NO_WEIGHTS = ("optimizer", "rng_state", "rerun_state_machine_state", "opt_param_scheduler", "progress")


@dataclass(frozen=True)
class _Place:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def read_common(folder: Path) -> Record | None:
    """The arguments in common.pt, None without."""
    path = folder / "common.pt"
    content = read_torch_file(path).content if path.exists() else {}
    return content.get("args") if isinstance(content, dict) else None


def args_of(record: Any) -> dict[str, Any]:
    """The arguments of a pickled Namespace that are plain values."""
    values = vars(record) if isinstance(record, Record) else {}
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str, tuple, list))}


def read_torch_dist(folder: Path, hf: HFCheckpoint) -> StoredModel:
    """Finds every parameter of a model.

    Raises:
        UserError: the checkpoint lacks a parameter or a part of one, holds one that the model does not have, or is broken.
    """
    chunks, sizes = _read_index(folder)
    used: set[str] = set()
    index = _ByLead(chunks)
    items = model_parameters(hf, defaultdict(lambda: "F32"))
    parameters = [_find(item, hf.architecture.num_layers, index, sizes, used) for item in items]
    if unknown := sorted(key for key in chunks if key not in used):
        raise UserError(
            f"{folder} holds {', '.join(unknown[:5])} ({len(unknown)} in all), which {hf.architecture.family.name} with this "
            "config.json does not have; give the model it was trained from"
        )
    return StoredModel(folder, tuple(parameters), args_of(read_common(folder)))


def _read_index(folder: Path) -> tuple[dict[str, list[_Place]], dict[str, tuple[int, ...]]]:
    path = folder / ".metadata"
    if not path.is_file():
        raise UserError(f"{folder} has no .metadata; it is no complete torch_dist checkpoint")
    metadata = read_pickle(path.read_bytes(), path)
    try:
        sizes = {
            str(key): tuple(int(size) for size in entry.size)
            for key, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "chunks") and not str(key).startswith(_NO_WEIGHTS)
        }
        chunks: dict[str, list[_Place]] = {key: [] for key in sizes}
        shapes = {
            (str(key), tuple(chunk.offsets)): tuple(int(size) for size in chunk.sizes)
            for key, entry in metadata.state_dict_metadata.items()
            if str(key) in sizes
            for chunk in entry.chunks
        }
        for index, place in metadata.storage_data.items():
            if index.fqn in chunks:
                offsets = tuple(int(offset) for offset in index.offset)
                file = _inside(folder, str(place.relative_path))
                sizes_here = shapes[index.fqn, offsets]
                chunks[index.fqn].append(_Place(offsets, sizes_here, file, int(place.offset), int(place.length)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a checkpoint ({error!r}); copy it again") from None
    return chunks, sizes


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise UserError(
            f"{folder / '.metadata'} names the file {name!r}, which is not in that folder; do not use this checkpoint"
        )
    if not (folder / name).is_file():
        raise UserError(f"{folder} lacks {name}, which its .metadata names; copy it again")
    return folder / name


class _ByLead:
    """The chunks of a key by the layer and expert they hold."""

    def __init__(self, chunks: dict[str, list[_Place]]) -> None:
        self.chunks = chunks
        self.found: dict[tuple[str, int], dict[tuple[int, ...], list[_Place]]] = {}

    def of(self, key: str, index: tuple[int, ...]) -> list[_Place]:
        lead = len(index)
        if (key, lead) not in self.found:
            places: dict[tuple[int, ...], list[_Place]] = defaultdict(list)
            for place in self.chunks[key]:
                ranges = (range(at, at + size) for at, size in zip(place.offsets[:lead], place.sizes, strict=False))
                for where in product(*ranges):
                    places[where].append(place)
            self.found[key, lead] = places
        return self.found[key, lead].get(index, [])


def _candidates(item: MegatronParameter, num_layers: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Keys that may hold a parameter, or rows of it: key, indices of the leading axes, first row, rows."""
    stacked = key_of(item.weight)
    keys = [stacked]
    if stacked == _LAYERS + NORM_BEFORE_MLP:
        keys.append(_LAYERS + NORM_BEFORE_EXPERTS)
    index = tuple(index for index, _ in axes(item, num_layers))
    for key in keys:
        yield from _halves(item, key, index)
        if item.weight.per_layer:
            single = key.replace(_LAYERS, f"{_LAYERS}{item.layer}.")
            yield from _halves(item, single, index[1:])
            if item.weight.experts:
                yield from _halves(item, single.replace("experts.experts.", f"experts.experts.{item.expert}."), ())


def _halves(
    item: MegatronParameter, key: str, index: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    yield key, index, 0, item.rows
    blocks, row = item.weight.part_layout.blocks(item.weight.rows), 0
    for suffix, rows in zip(("_w", "_v"), blocks, strict=False) if len(blocks) > 1 else ():
        yield f"{key}{suffix}", index, row, rows  # Megatron keeps gate and up apart where layers are not stacked
        row += rows


def _find(
    item: MegatronParameter, num_layers: int, chunks: _ByLead, sizes: dict[str, tuple[int, ...]], used: set[str]
) -> StoredParameter:
    blocks: list[Block] = []
    dtypes: set[str] = set()
    leading = tuple(size for _, size in axes(item, num_layers))
    for key, index, row, rows in _candidates(item, num_layers):
        if key not in sizes:
            continue
        used.add(key)
        shape = sizes[key][len(index) :]
        fits = shape[1:] == item.shape[1:] and (
            shape[:1] == (rows,) or (item.weight.is_vocabulary and shape[0] >= rows)
        )
        lead = leading[len(leading) - len(index) :]
        if not fits or sizes[key][: len(index)] != lead:
            raise UserError(
                f"{key} has shape {list(sizes[key])} in the checkpoint, but config.json gives "
                f"{[*lead, rows, *item.shape[1:]]}; give the model it was trained from"
            )
        blocks += [_block(place, index, row, dtypes) for place in chunks.of(key, index)]
    if not blocks:
        raise UserError(
            f"the checkpoint has no {item.name}, which config.json asks for; give the model it was trained from"
        )
    if len(dtypes) > 1:
        raise UserError(f"{item.name} is stored in {' and '.join(sorted(dtypes))}; save it in one dtype")
    return stored(replace(item, dtype=dtypes.pop()), blocks)


def _block(place: _Place, index: Sequence[int], row: int, dtypes: set[str]) -> Block:
    """The part of a chunk that belongs to one layer and expert."""
    lead, inner = len(index), place.sizes[len(index) :]
    relative = [at - first for at, first in zip(index, place.offsets, strict=False)]
    file = read_torch_file(place.file, place.start, place.length)
    tensor = file.content
    if not isinstance(tensor, StoredTensor) or tensor.shape != place.sizes:
        raise UserError(f"{place.file} holds something else at byte {place.start} than .metadata says; copy it again")

    dtypes.add(tensor.dtype)
    before = 0
    for at, size in zip(relative, place.sizes, strict=False):
        before = before * size + at
    start = file.place(tensor) + before * math.prod(inner) * ITEM_SIZE[tensor.dtype]
    offsets = place.offsets[lead:]
    column = offsets[1] if len(offsets) > 1 else 0
    first, rows = offsets[0] if offsets else 0, inner[0] if inner else 1
    return Block(str(place.file), start, row + first, rows, column, math.prod(inner[1:]))
