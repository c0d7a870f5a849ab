"""The torch_dist format: a directory that Megatron loads at any tensor, pipeline, expert and context parallelism.

    __N_0.distcp    torch.save blobs one after the other, a chunk of a parameter each
    .metadata       a pickled torch.distributed.checkpoint Metadata: which chunk lies where
    common.pt       arguments and content_metadata
    metadata.json   names the format

All layers of a parameter are one tensor with a leading axis, experts a second one. A chunk is at most `CHUNK_BYTES` of
consecutive rows, in a power of two of chunks, so that tensor-parallel ranks find theirs without reading the neighbours'.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from simpo_megatron.checkpoint.formats.dtypes import TORCH
from simpo_megatron.checkpoint.formats.torch_save_file import Layout, lay_out
from simpo_megatron.checkpoint.parameters import Block, MegatronParameter
from simpo_megatron.checkpoint.transfer.moves import OutFile
from simpo_megatron.models.weight_table import WeightEntry

CHUNK_BYTES = 64 * 2**20
FILE_BYTES = 2 * 2**30
OBJECTS = "__objects.distcp"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Megatron's `content_metadata`, in what this package saves and converts. The optimizer state must load at another
# data-parallel size, and Megatron's default sharding type does not.
CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

# The norm before experts has one name in Transformer Engine's spec and another in the local one; a checkpoint has both.
NORM_BEFORE_MLP, NORM_BEFORE_EXPERTS = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
_LAYERS, _LOCAL_EXPERTS, _EXPERTS = "decoder.layers.", "mlp.experts.local_experts.{expert}.", "mlp.experts.experts."


def key_of(weight: WeightEntry) -> str:
    """The key of all layers and experts of a parameter."""
    return weight.megatron.replace("{layer}.", "").replace(_LOCAL_EXPERTS, _EXPERTS)


def axes(item: MegatronParameter, num_layers: int) -> tuple[tuple[int, int], ...]:
    """Index and size of the leading axes: the layer and the expert."""
    layer = ((item.layer, num_layers),) if item.weight.per_layer else ()
    return layer + (((item.expert, item.weight.experts),) if item.weight.experts else ())


@dataclass(frozen=True)
class Chunk:
    """One entry of `.metadata`."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass
class DistFile:
    """A .distcp file in the making: its parameters, with the blocks of each."""

    name: str
    size: int = 0
    fixed: list[tuple[int, bytes]] = field(default_factory=list)
    items: list[tuple[MegatronParameter, list[Block]]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    def out(self) -> OutFile:
        return OutFile(self.name, self.size, tuple(self.fixed))

    def add(self, item: MegatronParameter, num_layers: int, norm_before_experts: bool) -> None:
        """Appends a parameter's chunks."""
        leading, blocks = axes(item, num_layers), []
        for row, rows in chunk_rows(item):
            sizes = (*(1 for _ in leading), rows, *item.shape[1:])
            blob = _blob(sizes, item.dtype)
            offsets = (*(index for index, _ in leading), row, *(0 for _ in item.shape[1:]))
            blocks.append(Block(self.name, self.size + blob.holes[0], row, rows, 0, item.columns))
            key = key_of(item.weight)
            keys = [key]
            if norm_before_experts and key == _LAYERS + NORM_BEFORE_MLP:
                keys.append(_LAYERS + NORM_BEFORE_EXPERTS)  # the same bytes under both names
            self.chunks += [Chunk(name, offsets, sizes, self.name, self.size, blob.size) for name in keys]
            self.fixed += [(self.size + at, data) for at, data in blob.fixed]
            self.size += blob.size
        self.items.append((item, blocks))


def lay_out_files(items: Sequence[MegatronParameter], num_layers: int) -> list[DistFile]:
    """Distributes the parameters over files of about `FILE_BYTES`."""
    files: list[DistFile] = []
    experts = any(item.weight.experts for item in items)
    for item in items:
        if not files or files[-1].size + item.size > FILE_BYTES:
            files.append(DistFile(f"__{len(files)}_0.distcp"))
        files[-1].add(item, num_layers, experts)
    return files


def chunk_rows(item: MegatronParameter) -> Iterator[tuple[int, int]]:
    """First row and rows of the chunks; gate and up have chunks of their own."""
    first = 0
    for block in item.weight.part_layout.blocks(item.weight.rows):
        count = 1 << max(0, math.ceil(math.log2(max(1, block * item.row_bytes / CHUNK_BYTES))))
        rows = -(-block // count)
        for row in range(0, block, rows):
            yield first + row, min(rows, block - row)
        first += block


@cache
def _blob(sizes: tuple[int, ...], dtype: str) -> Layout:
    return lay_out(lambda: torch.empty(sizes, dtype=TORCH[dtype]))


def extra_states(items: Sequence[MegatronParameter], num_layers: int) -> Iterator[str]:
    """Keys of the `_extra_state` objects a model may ask for, in either spec.

    Transformer Engine keeps fp8 scales there; in bf16 and fp32 they are empty, and the local spec ignores them. Missing ones
    stop a load, superfluous ones do not.
    """
    modules: dict[str, int] = {}
    for item in items:
        module = key_of(item.weight).rpartition(".")[0]
        if item.weight.tp_dim is not None or "norm" in module:
            modules.setdefault(module, item.weight.experts)
    if any(modules.values()):
        modules |= {_LAYERS + "pre_mlp_layernorm": 0}
        modules.pop(_LAYERS + "mlp.linear_fc1", None)
    for module, experts in modules.items():
        if not module.startswith("decoder."):
            continue
        if not module.startswith(_LAYERS):
            yield f"{module}._extra_state/shard_0_1"
            continue
        for layer in range(num_layers):
            if not experts:
                yield f"{module}._extra_state/shard_{layer}_{num_layers}"
            for expert in range(experts):
                yield f"{module}._extra_state/shard_{layer}.{expert}_{num_layers}.{experts}"


def write_objects(folder: Path) -> int:
    """Writes the one object that all `_extra_state` keys share; returns its length."""
    with (folder / OBJECTS).open("wb") as stream:
        torch.save([torch.empty(0, dtype=torch.uint8)], stream)
    return (folder / OBJECTS).stat().st_size


def write_metadata(folder: Path, files: Sequence[DistFile], num_layers: int, common: dict[str, Any]) -> None:
    """Writes what makes the data files a checkpoint, metadata.json last."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    items = [item for file in files for item, _ in file.items]
    dtypes = {key_of(item.weight): TORCH[item.dtype] for item in items}
    dtypes[_LAYERS + NORM_BEFORE_EXPERTS] = dtypes[_LAYERS + NORM_BEFORE_MLP]
    sizes = {}
    for item in items:
        sizes[key_of(item.weight)] = (*(size for _, size in axes(item, num_layers)), *item.shape)
    sizes[_LAYERS + NORM_BEFORE_EXPERTS] = sizes[_LAYERS + NORM_BEFORE_MLP]
    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for chunk in (chunk for file in files for chunk in file.chunks):
        if chunk.key not in state:
            properties = TensorProperties(dtype=dtypes[chunk.key])
            state[chunk.key] = TensorStorageMetadata(properties, torch.Size(sizes[chunk.key]), [])
        offsets = torch.Size(chunk.offsets)
        index = MetadataIndex(chunk.key, offsets, len(state[chunk.key].chunks))
        state[chunk.key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
        storage[index] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
    length = write_objects(folder)
    for key in extra_states(items, num_layers):
        state[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(OBJECTS, 0, length)
    torch.save(common | {"content_metadata": CONTENT_METADATA}, folder / "common.pt")
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(Metadata(state, None, storage), stream)
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
