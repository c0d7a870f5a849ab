"""The torch_dist format: a directory that Megatron loads at any tensor, pipeline, expert and context parallelism.

    __N_0.distcp    torch.save files one after the other, each with a chunk of a parameter
    .metadata       a pickled torch.distributed.checkpoint Metadata: which chunk is where
    common.pt       arguments and content_metadata
    metadata.json   names the format

All layers of a parameter are one tensor with a leading axis; experts are a second one. Where the layers differ, each
has keys of its own (`TransformerBlock.sharded_state_dict`). A chunk, torch's word, is at most `CHUNK_BYTES` of
consecutive rows. Each block of rows has a power of two of chunks, so that a tensor-parallel rank finds its own without
reading its neighbours'.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import torch

from simpo_megatron.checkpoint.formats.torch_save_file import Skeleton, skeleton_of
from simpo_megatron.checkpoint.parameters import Block, FileSet, MegatronParameter
from simpo_megatron.checkpoint.transfer.moves import OutFile
from simpo_megatron.models.dtypes import TORCH
from simpo_megatron.models.weight_table import SEPARATE_NORMS, WeightEntry

CHUNK_BYTES = 64 * 2**20
FILE_BYTES = 2 * 2**30
OBJECTS = "__objects.distcp"
FORMAT_FILE = "metadata.json"  # the writer writes it last
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Megatron's `content_metadata` for the converter, and for the trainer with changes (`trainer/optimizer_format.py`).
CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

LAYERS = "decoder.layers."
_LOCAL_EXPERTS, _EXPERTS = "mlp.experts.local_experts.{expert}.", "mlp.experts.experts."


def key_of(entry: WeightEntry) -> str:
    """The key of all layers and experts of a parameter."""
    return entry.megatron.replace("{layer}.", "").replace(_LOCAL_EXPERTS, _EXPERTS)


def key_of_layer(key: str, layer: int) -> str:
    """The key of one layer, from that of all layers; unchanged where it does not belong to a layer."""
    return key.replace(LAYERS, f"{LAYERS}{layer}.")


def leading_axes(parameter: MegatronParameter) -> tuple[tuple[int, int], ...]:
    """Index and size of the axes before the parameter's own: the layer and the expert, where it has them."""
    layer = () if parameter.stacked is None else ((parameter.layer, parameter.stacked),)
    return layer + (((parameter.expert, parameter.entry.experts),) if parameter.entry.experts else ())


def lay_out_files(parameters: Sequence[MegatronParameter]) -> list[FileSet]:
    """Distributes the parameters over files of about `FILE_BYTES`, in order."""
    files: list[_DistFile] = []
    for parameter in parameters:
        if not files or files[-1].size + parameter.size > FILE_BYTES:
            files.append(_DistFile(f"__{len(files)}_0.distcp"))
        files[-1].add(parameter)
    return [FileSet(file.name, (OutFile(file.name, file.size, tuple(file.fixed)),), file.blocks) for file in files]


class _DistFile:
    """A .distcp file while parameters are added to it."""

    def __init__(self, name: str) -> None:
        self.name, self.size = name, 0
        self.fixed: list[tuple[int, bytes]] = []
        self.blocks: dict[str, list[Block]] = {}

    def add(self, parameter: MegatronParameter) -> None:
        """Appends the chunks of a parameter."""
        blocks = self.blocks[parameter.name] = []
        for row, rows in _chunk_rows(parameter):
            skeleton = _chunk(_chunk_shape(parameter, rows), parameter.dtype)
            blocks.append(Block(self.name, self.size + skeleton.starts[0], row, rows, 0, parameter.columns))
            self.fixed += [(self.size + at, data) for at, data in skeleton.fixed]
            self.size += skeleton.size


def _chunk_rows(parameter: MegatronParameter) -> Iterator[tuple[int, int]]:
    """First row and rows of each chunk; gate and up have chunks of their own."""
    first = 0
    for block in parameter.entry.part_layout.blocks(parameter.entry.rows):
        count = 1 << max(0, math.ceil(math.log2(max(1, block * parameter.row_bytes / CHUNK_BYTES))))
        rows = -(-block // count)
        for row in range(0, block, rows):
            yield first + row, min(rows, block - row)
        first += block


def _chunk_shape(parameter: MegatronParameter, rows: int) -> tuple[int, ...]:
    """Of `rows` rows of one layer and one expert."""
    return (*(1 for _ in leading_axes(parameter)), rows, *parameter.shape[1:])


@cache
def _chunk(shape: tuple[int, ...], dtype: str) -> Skeleton:
    return skeleton_of(lambda: torch.empty(shape, dtype=TORCH[dtype]))


def _extra_states(parameters: Sequence[MegatronParameter]) -> Iterator[str]:
    """Keys of the `_extra_state` objects that a model may ask for, in either spec.

    Transformer Engine keeps fp8 scales there. In bf16 and fp32 they are empty, and the local spec ignores them. A
    missing one stops a load, a superfluous one does not.
    """
    names, seen = {parameter.name for parameter in parameters}, set()
    for parameter in parameters:
        *_, key = _keys(parameter, names)
        module = key.rpartition(".")[0]
        axes = leading_axes(parameter) or ((0, 1),)
        index, sizes = (".".join(map(str, numbers)) for numbers in zip(*axes, strict=True))
        state = f"{module}._extra_state/shard_{index}_{sizes}"
        if module.startswith("decoder.") and (".linear_" in module or "norm" in module) and state not in seen:
            seen.add(state)
            yield state


def _write_objects(folder: Path) -> int:
    """Writes the one object that all `_extra_state` keys share; returns its bytes."""
    content = _saved([torch.empty(0, dtype=torch.uint8)])
    return (folder / OBJECTS).write_bytes(content)


def _saved(value: Any) -> bytes:
    """What torch.save writes. It goes through memory: on a full disk torch raises errors that do not say so."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_metadata(
    folder: Path,
    parameters: Sequence[MegatronParameter],
    file_sets: Sequence[FileSet],
    common: dict[str, Any],
) -> None:
    """Writes what makes the data files a checkpoint, metadata.json last.

    The folder has no name that a reader looks for until publish.py has synced all of its files and renamed it.

    Args:
        folder: with the data files.
        parameters: all of them.
        file_sets: from `lay_out_files`.
        common: the content of common.pt but for `CONTENT_METADATA`.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    by_name = {parameter.name: parameter for parameter in parameters}
    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    held = (pair for files in file_sets for pair in files.blocks.items())
    for parameter, block in ((by_name[name], block) for name, blocks in held for block in blocks):
        leading, inner = leading_axes(parameter), parameter.shape[1:]
        shape = _chunk_shape(parameter, block.rows)
        chunk = _chunk(shape, parameter.dtype)
        for key in _keys(parameter, by_name.keys()):
            if key not in state:
                whole = torch.Size((*(size for _, size in leading), *parameter.shape))
                state[key] = TensorStorageMetadata(TensorProperties(dtype=TORCH[parameter.dtype]), whole, [])
            offsets = torch.Size((*(index for index, _ in leading), block.row, *(0 for _ in inner)))
            index = MetadataIndex(key, offsets, len(state[key].chunks))
            state[key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(shape)))
            storage[index] = _StorageInfo(block.file, block.offset - chunk.starts[0], chunk.size)
    length = _write_objects(folder)
    for key in _extra_states(parameters):
        state[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(OBJECTS, 0, length)
    (folder / "common.pt").write_bytes(_saved(common | {"content_metadata": CONTENT_METADATA}))
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(Metadata(state, None, storage), stream)
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))


def _keys(parameter: MegatronParameter, names: Set[str]) -> Iterator[str]:
    """The keys of a parameter.

    A norm that is a module of its own has the same bytes under that name too, which comes last: Transformer Engine's
    spec asks for one of the names, and Megatron's plain one may ask for the other.

    Args:
        parameter: which.
        names: of all parameters.
    """
    key = key_of(parameter.entry)
    keys = [key]
    separate = SEPARATE_NORMS.get(key.removeprefix(LAYERS))
    if separate and parameter.name.replace("layer_norm_weight", "weight") not in names:
        keys.append(LAYERS + separate)
    for one in keys:
        yield key_of_layer(one, parameter.layer) if parameter.stacked is None else one
