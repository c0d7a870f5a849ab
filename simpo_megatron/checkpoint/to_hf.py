"""Megatron -> Hugging Face: the plan of a conversion, and running it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simpo_megatron.checkpoint.folder import FORMAT
from simpo_megatron.checkpoint.formats.rank_files_reader import read_rank_files
from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.checkpoint.parameters import StoredModel, StoredParameter
from simpo_megatron.checkpoint.transfer.cut import read_step, slab_bytes
from simpo_megatron.checkpoint.transfer.execute import Files, read_rect
from simpo_megatron.checkpoint.transfer.moves import OutFile, Rect, Step, Unit
from simpo_megatron.checkpoint.transfer.publish import Options, Target, file_stamps, fingerprint, run
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write
from simpo_megatron.models.hf_checkpoint import (
    COPIED,
    INDEX,
    MAX_FILE_BYTES,
    HFCheckpoint,
    copied_files,
    file_names,
    index_text,
    split_files,
)


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor of a plan: what it comes from, where it goes."""

    source: str
    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Export:
    """A plan: its model, the units of work and the tensors they write."""

    hf: HFCheckpoint
    saved: StoredModel
    units: tuple[Unit, ...]
    tensors: tuple[Tensor, ...]


def read_checkpoint(folder: Path, hf: HFCheckpoint) -> StoredModel:
    """Finds the parameters of a model in a folder of either format."""
    path = folder / FORMAT
    if not path.is_file():
        return read_rank_files(folder, hf)
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); copy it again") from None
    if backend != "torch_dist":
        raise UserError(f"{path} names the format {backend!r}; only torch_dist and torch checkpoints convert")
    return read_torch_dist(folder, hf)


def plan_export(
    hf: HFCheckpoint,
    saved: StoredModel,
    options: Options,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Export:
    """Plans every byte.

    Args:
        hf: the config the weights belong to.
        saved: the checkpoint.
        options: the size of the slabs follows from its memory and workers.
        dtype: of all tensors, such as "BF16"; None keeps theirs.
        max_file_bytes: no file gets larger, unless one tensor is.
    """
    size = slab_bytes(options.max_memory, options.workers)
    parts = [(stored, part) for stored in saved.parameters for part in range(len(stored.item.weight.shapes))]
    sizes = [
        math.prod(stored.item.weight.shapes[part]) * ITEM_SIZE[dtype or stored.item.dtype] for stored, part in parts
    ]
    files = [[parts[position] for position in file] for file in split_files(sizes, max_file_bytes)]
    units, tensors = [], []
    for name, members in zip(file_names(len(files)), files, strict=True):
        found = [
            Tensor(
                stored.item.name,
                stored.item.hf[part],
                name,
                stored.item.weight.shapes[part],
                dtype or stored.item.dtype,
            )
            for stored, part in members
        ]
        header, offsets = safetensors_header(found)
        steps: list[Step] = [
            read_step(stored.item, part, stored.tiles, (), size, (name, offset, tensor.dtype))
            for (stored, part), tensor, offset in zip(members, found, offsets, strict=True)
        ]
        end = len(header) + sum(tensor.size for tensor in found)
        units.append(Unit(name, (OutFile(name, end, ((0, header),)),), tuple(steps)))
        tensors += found
    return Export(hf, saved, tuple(units), tuple(tensors))


def safetensors_header(tensors: Sequence[Tensor]) -> tuple[bytes, list[int]]:
    """The header of a safetensors file, and the first byte of every tensor in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, []
    for tensor in tensors:
        starts.append(position)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]


def check_padding(saved: StoredModel) -> None:
    """Makes sure that no padding row of the vocabulary was trained: they are not exported.

    Raises:
        UserError: one is not zero.
    """
    files = Files(None)
    try:
        for stored in saved.parameters:
            if count := sum(_nonzero_rows(files, stored)):
                raise UserError(
                    f"{stored.item.name} has {count} rows beyond the vocabulary of {stored.item.rows} that are not zero: "
                    "they were trained, or config.json has another vocab_size; --drop-trained-padding exports without them"
                )
    finally:
        files.close()


def _nonzero_rows(files: Files, stored: StoredParameter) -> list[int]:
    counts = []
    for block in stored.tiles:
        row_bytes = block.columns * stored.item.item_size
        for row in range(max(block.row, stored.item.rows), block.row + block.rows):
            data = np.empty(row_bytes, np.uint8)
            at = block.offset + (row - block.row) * row_bytes
            read_rect(files, Rect(block.file, at, 1, row_bytes, 0, row_bytes), data)
            counts.append(int(data.any()))
    return counts


def convert_to_hf(export: Export, save: Path, options: Options) -> bool:
    """Runs a plan into `save`; returns whether it is published (see `run.run`).

    Raises:
        UserError: as `run.run`.
    """
    sources = sorted(path for path in export.saved.folder.rglob("*") if path.is_file())
    dtypes = sorted({tensor.dtype for tensor in export.tensors})
    plan = fingerprint("to hf", 1, export.hf.config, file_stamps(sources), dtypes)

    def finish(folder: Path, hashes: dict[str, str]) -> None:
        names = {unit.name for unit in export.units}
        if len(names) > 1:
            files = {tensor.name: tensor.file for tensor in export.tensors}
            atomic_write(folder / INDEX, index_text(files, sum(tensor.size for tensor in export.tensors)))
        for source in copied_files(export.hf.path):
            shutil.copyfile(source, folder / source.name)
        if not (folder / "config.json").exists():
            atomic_write(folder / "config.json", json.dumps(export.hf.config, indent=2) + "\n")

    target = Target(save, save, lambda: None, lambda: _replaceable(save))
    return run(export.units, target, options, plan, finish, f"to {save}")


def _replaceable(save: Path) -> bool:
    patterns = (*COPIED, "*.safetensors", INDEX)
    return all(path.is_file() and any(path.match(pattern) for pattern in patterns) for path in save.iterdir())
