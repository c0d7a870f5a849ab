"""Megatron -> Hugging Face: reads a checkpoint of either format and plans a conversion. `publish.run` runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from simpo_megatron.checkpoint.formats.rank_files_reader import read_rank_files
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.checkpoint.parameters import StoredModel, StoredParameter
from simpo_megatron.checkpoint.source import tensor_bytes
from simpo_megatron.checkpoint.transfer.cut import piece_bytes, plan_from_blocks
from simpo_megatron.checkpoint.transfer.execute import Files, read_rect
from simpo_megatron.checkpoint.transfer.moves import OutFile, Rect, Unit
from simpo_megatron.checkpoint.transfer.publish import Conversion, Options, PlanLine, file_stamps, fingerprint
from simpo_megatron.errors import UserError
from simpo_megatron.files import WRITTEN, atomic_write, record_files, wrote_all
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, copied_files
from simpo_megatron.models.weight_files import INDEX, MAX_FILE_BYTES, HFTensor, file_names, index_text, split_tensors
from simpo_megatron.models.weight_table import tensor_and_slice


def read_checkpoint(folder: Path, hf: HFCheckpoint) -> StoredModel:
    """Finds the parameters of a model in a folder of either format.

    Raises:
        UserError: as `read_rank_files` and `read_torch_dist`, or the folder is of another format.
    """
    path = folder / FORMAT_FILE
    if not path.is_file():
        return read_rank_files(folder, hf)
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); copy it again") from None
    if backend != "torch_dist":
        raise UserError(f"{path} names the format {backend!r}; only torch_dist and torch checkpoints convert")
    return read_torch_dist(folder, hf)


def plan_to_hf(
    hf: HFCheckpoint,
    saved: StoredModel,
    save: Path,
    options: Options,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Conversion:
    """Plans every byte of `save`.

    Args:
        hf: the config that the weights belong to.
        saved: the checkpoint.
        save: the folder to make.
        options: its memory and workers give the size of the pieces.
        dtype: of all tensors, such as "BF16"; None keeps theirs.
        max_file_bytes: no file gets larger, unless one tensor is.
    """
    held = {
        stored.parameter.hf[parts[0]]: (stored, parts)
        for stored in saved.parameters
        for parts in stored.parameter.entry.tensors
    }
    tensors = {
        name: HFTensor(save, stored.parameter.entry.shape_of(parts), dtype or stored.parameter.dtype)
        for name, (stored, parts) in held.items()
    }
    sizes = {name: tensor_bytes(tensor) for name, tensor in tensors.items()}
    size = piece_bytes(options.max_memory, options.workers)
    units, lines, weight_map = [], [], {}
    groups = split_tensors(sizes, max_file_bytes)
    for file, names in zip(file_names(len(groups)), groups, strict=True):
        header, starts = safetensors_header({name: tensors[name] for name in names})
        moves = []
        for name, start in zip(names, starts, strict=True):
            stored, parts = held[name]
            moves.append(plan_from_blocks(stored, parts, size, (file, start, tensors[name].dtype)))
            lines.append(PlanLine(stored.parameter.name, f"{name} in {file}", sizes[name], tensors[name].dtype))
            weight_map[name] = file
        end = len(header) + sum(sizes[name] for name in names)
        units.append(Unit(file, (OutFile(file, end, ((0, header),)),), tuple(moves)))

    def identity() -> str:
        sources = sorted(path for path in saved.folder.rglob("*") if path.is_file())
        dtypes = sorted({tensor.dtype for tensor in tensors.values()})
        return fingerprint("to hf", 1, hf.config, file_stamps(sources), dtypes)

    def finish(folder: Path, hashes: dict[str, str], plan: str) -> None:
        if len(units) > 1:
            atomic_write(folder / INDEX, index_text(weight_map, sum(sizes.values())))
        for source in copied_files(hf.path):
            shutil.copyfile(source, folder / source.name)
        if not (folder / "config.json").exists():
            atomic_write(folder / "config.json", json.dumps(hf.config, indent=2) + "\n")
        record_files(folder, plan)

    return Conversion(
        units=tuple(units),
        lines=tuple(lines),
        root=save,
        final=save,
        record=WRITTEN,
        identity=identity,
        finish=finish,
        publish=lambda: None,
        replaceable=partial(wrote_all, save),
    )


def safetensors_header(tensors: Mapping[str, HFTensor]) -> tuple[bytes, list[int]]:
    """The header of a safetensors file, and the first byte of every tensor in the file.

    Args:
        tensors: tensors and slices of tensors by name, in the order of their bytes; only shapes and dtypes are read.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, []
    for name, tensor in tensors.items():
        end = position + tensor_bytes(tensor)
        starts.append(position)
        whole, index = tensor_and_slice(name)
        if index is None:
            entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        else:  # slices follow each other: each makes the tensor longer
            start = position if index == 0 else entries[whole]["data_offsets"][0]
            shape = [index + 1, *tensor.shape]
            entries[whole] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [start, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]


def check_padding(saved: StoredModel) -> None:
    """Makes sure that no padding row of the vocabulary was trained: padding is not converted.

    Raises:
        UserError: one is not zero.
    """
    files = Files(None)
    try:
        for stored in saved.parameters:
            if count := _nonzero_padding_rows(files, stored):
                raise UserError(
                    f"{stored.parameter.name} has {count} rows beyond the vocabulary of {stored.parameter.rows} that "
                    "are not zero: they were trained, or config.json has another vocab_size; --drop-trained-padding "
                    "converts without them"
                )
    finally:
        files.close()


def _nonzero_padding_rows(files: Files, stored: StoredParameter) -> int:
    count = 0
    for block in stored.tiles:
        row_bytes = block.columns * stored.parameter.item_size
        for row in range(max(block.row, stored.parameter.rows), block.row + block.rows):
            data = np.empty(row_bytes, np.uint8)
            at = block.offset + (row - block.row) * row_bytes
            read_rect(files, Rect(block.file, at, 1, row_bytes, 0, row_bytes), data)
            count += int(data.any())
    return count
