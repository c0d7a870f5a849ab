"""Finds the parameters in the rank files of a `torch` checkpoint, of either spec and either kind of experts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from simpo_megatron.checkpoint.formats.rank_files_writer import FILE
from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE, PickledTensor
from simpo_megatron.checkpoint.formats.torch_dist_reader import args_of
from simpo_megatron.checkpoint.formats.torch_save_file import TorchFile, read_torch_file
from simpo_megatron.checkpoint.parameters import (
    Block,
    MegatronParameter,
    StoredModel,
    StoredParameter,
    model_parameters,
)
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.part_layout import rank_rows
from simpo_megatron.models.weight_table import EMBEDDING, OUTPUT, canonical_name

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?$")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.")
Rank = tuple[int, int, int]  # tensor, pipeline, expert


def read_rank_files(folder: Path, hf: HFCheckpoint) -> StoredModel:
    """Finds every parameter of a model.

    Raises:
        UserError: a rank's file is missing or broken, a parameter is missing, mis-shaped or unknown.
    """
    files = _rank_files(folder, hf)
    parameters = {parameter.name: parameter for parameter in model_parameters(hf, defaultdict(lambda: "F32"))}
    blocks, dtypes = _collect(files, parameters, hf)
    if absent := [name for name in parameters if name not in blocks]:
        raise UserError(f"{folder} has no {absent[0]} ({len(absent)} parameters in all), which config.json asks for")
    found = []
    for name, parameter in parameters.items():
        if len(dtypes[name]) > 1:
            raise UserError(f"{name} is stored in {' and '.join(sorted(dtypes[name]))}; save it in one dtype")
        found.append(StoredParameter.from_blocks(replace(parameter, dtype=dtypes[name].pop()), blocks[name]))
    return StoredModel(folder, tuple(found), args_of(_content(files[0, 0, 0]).get("args")))


def any_rank_file(folder: Path) -> TorchFile | None:
    """One of the files of a folder in this format; None where it has none."""
    path = next(iter(sorted(folder.glob(f"mp_rank_*/{FILE}"))), None)
    return None if path is None else read_torch_file(path)


def _rank_files(folder: Path, hf: HFCheckpoint) -> dict[Rank, TorchFile]:
    """The files of all ranks, stage by stage. Raises UserError where one is missing."""
    found: dict[Rank, TorchFile] = {}
    experts = any(entry.experts for entry in hf.architecture.weights)
    for path in sorted(folder.glob(f"mp_rank_*/{FILE}")):
        match = _RANK.match(path.parent.name)
        if not match:
            continue
        numbers = [int(group) for group in match.groups() if group is not None]
        if len(numbers) == 2 and experts and _is_expert_rank(folder):
            numbers = [numbers[0], 0, numbers[1]]
        tensor, stage, expert = (*numbers, 0, 0)[:3]
        found[tensor, stage, expert] = read_torch_file(path)
    if not found:
        raise UserError(f"{folder} has no mp_rank_00 folder with a {FILE}; give the folder of one iteration")
    tensors, stages, expert_ranks = (1 + max(rank[axis] for rank in found) for axis in range(3))
    ranks = [(t, p, e) for p in range(stages) for e in range(expert_ranks) for t in range(tensors)]
    if missing := [rank for rank in ranks if rank not in found]:
        raise UserError(f"{folder} lacks the file of tensor, pipeline and expert rank {missing[0]}; copy it again")
    return {rank: found[rank] for rank in ranks}


def _is_expert_rank(folder: Path) -> bool:
    """Whether the second number of the folders counts expert ranks: with one stage every file has the embedding."""
    path = next(folder.glob(f"mp_rank_00_001/{FILE}"), None)
    return path is not None and any(EMBEDDING in model for model in _models(read_torch_file(path)).values())


def _collect(
    files: dict[Rank, TorchFile], parameters: dict[str, MegatronParameter], hf: HFCheckpoint
) -> tuple[dict[str, list[Block]], dict[str, set[str]]]:
    """Blocks and dtypes in all files, by canonical name."""
    tensor_ranks, expert_ranks = (1 + max(rank[axis] for rank in files) for axis in (0, 2))
    blocks: dict[str, list[Block]] = defaultdict(list)
    dtypes: dict[str, set[str]] = defaultdict(set)
    first_layers = _first_layers(files)
    for rank, file in files.items():
        for name, key, tensor in _tensors(file, rank, first_layers, hf, expert_ranks):
            if name not in parameters:
                raise UserError(
                    f"{file.path} holds {key}, which {hf.architecture.family.name} with this config.json does not "
                    "have; give the --hf-checkpoint it was trained from"
                )
            dtypes[name].add(tensor.dtype)
            blocks[name] += _blocks(parameters[name], file, key, tensor, rank[0], tensor_ranks)
    return blocks, dtypes


def _content(file: TorchFile) -> dict:
    if not isinstance(file.content, dict):
        raise UserError(f"{file.path} does not hold a checkpoint; copy it again")
    return file.content


def _models(file: TorchFile) -> dict[int, dict]:
    """The model chunks of a rank by virtual stage."""
    content = _content(file)
    chunks = {0: content["model"]} if "model" in content else {}
    chunks |= {int(key[5:]): value for key, value in content.items() if re.fullmatch(r"model\d+", str(key))}
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks.values()):
        raise UserError(
            f"{file.path} does not hold a model; give a checkpoint that Megatron-LM saved with --ckpt-format torch"
        )
    return chunks


def _first_layers(files: dict[Rank, TorchFile]) -> dict[tuple[int, int], int]:
    """The first global layer of every (pipeline, virtual) stage: layers go through all stages once a virtual stage."""
    counts = {}
    for (tensor, stage, expert), file in files.items():
        if tensor == expert == 0:
            for virtual, chunk in _models(file).items():
                layers = {int(match[1]) for key in chunk if (match := _LAYER.match(str(key)))}
                counts[virtual, stage] = len(layers)
    first, at = {}, 0
    for virtual, stage in sorted(counts):
        first[stage, virtual] = at
        at += counts[virtual, stage]
    return first


def _tensors(
    file: TorchFile, rank: Rank, first_layers: dict[tuple[int, int], int], hf: HFCheckpoint, expert_ranks: int
) -> Iterator[tuple[str, str, PickledTensor]]:
    """Canonical name, key and tensor of every parameter of a rank."""
    for virtual, chunk in _models(file).items():
        for key, tensor in chunk.items():
            if key.endswith("_extra_state") or not isinstance(tensor, PickledTensor):
                continue
            if re.search(r"experts\.weight[12]$", key):
                raise UserError(
                    f"{file.path} holds {key}, all experts of --moe-use-legacy-grouped-gemm in one tensor; save it "
                    "with sequential experts"
                )
            name = canonical_name(key)
            if match := _LAYER.match(name):
                layer = int(match[1]) + first_layers[rank[1], virtual]
                name = f"decoder.layers.{layer}.{name[match.end() :]}"
            if match := _EXPERT.search(name):
                experts = next(entry.experts for entry in hf.architecture.weights if entry.experts)
                expert = int(match[1]) + rank[2] * experts // expert_ranks
                name = f"{name[: match.start()]}experts.local_experts.{expert}.{name[match.end() :]}"
            yield EMBEDDING if name == OUTPUT and hf.architecture.tied else name, key, tensor


def _blocks(
    parameter: MegatronParameter, file: TorchFile, key: str, tensor: PickledTensor, rank: int, ranks: int
) -> Iterator[Block]:
    """The blocks in one rank's tensor."""
    entry, shape = parameter.entry, list(parameter.shape)
    if entry.tp_dim is not None and entry.is_vocabulary:
        shape[0] = tensor.shape[0] if tensor.shape and tensor.shape[0] * ranks >= parameter.rows else -1
    elif entry.tp_dim is not None:
        shape[entry.tp_dim] //= ranks
    if list(tensor.shape) != shape:
        raise UserError(
            f"{file.path} holds {key} in shape {list(tensor.shape)}, but config.json gives {shape} on {ranks} ranks"
        )
    start, columns = file.place(tensor), math.prod(shape[1:])
    if entry.tp_dim == 1:
        yield Block(str(file.path), start, 0, shape[0], rank * columns, columns)
        return
    held = [(0, parameter.rows)] if entry.tp_dim is None else rank_rows(entry.part_layout, entry.rows, rank, ranks)
    if entry.is_vocabulary:
        held = [(rank * shape[0], shape[0])]  # padding included
    for row, rows in held:
        yield Block(str(file.path), start, row, rows, 0, columns)
        start += rows * columns * ITEM_SIZE[tensor.dtype]
