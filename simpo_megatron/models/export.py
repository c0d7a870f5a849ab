"""The parameters of all ranks -> a Hugging Face checkpoint: the inverse of load.py.

One rank of every tensor-parallel group writes its own files, and so does one rank of every expert-tensor-parallel
group; the first rank of every expert-parallel group writes tensors that hold all experts of a layer. So no rank ever
holds more than one file (5 GiB) of whole tensors. The files are written into a directory next
to the target, which is renamed to the target only when every file is complete and flushed to the disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write, check_empty, follow_umask, record_files, sync
from simpo_megatron.models.dtypes import TORCH
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, copied_files
from simpo_megatron.models.part_layout import join_ranks
from simpo_megatron.models.placement import PlacedParameter, place_parameters
from simpo_megatron.models.weight_files import INDEX, MAX_FILE_BYTES, file_names, index_text, split_tensors
from simpo_megatron.models.weight_table import OUTPUT, WeightEntry, tensor_and_slice
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks

File = dict[str, int]  # the tensors of one file by name, with their bytes


class Merged(Protocol):
    """Models with an adapter, as models without one.

    Attributes:
        table: the weight table, with an entry for every parameter of the models.
    """

    table: Sequence[WeightEntry]

    def __call__(self, place: PlacedParameter) -> Tensor:
        """This rank's share of a weight with the adapter added, in the weight's shape and dtype."""
        ...


def export_hf(
    models: Sequence[torch.nn.Module],
    hf: HFCheckpoint,
    directory: Path,
    progress: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    merged: Merged | None = None,
    more_files: Mapping[str, str] | None = None,
) -> None:
    """Writes the models as a checkpoint for transformers, in the dtype of the parameters. Every rank calls it.

    Collectives: over all ranks a broadcast and four gathers of small objects. In one of the data-parallel replicas,
    over each tensor-parallel group (for experts, each expert-tensor-parallel group), one gather for every parameter
    that is split, and over each expert-parallel group the gathers of `_joined`.

    Args:
        models: of this rank, wrapped by DDP or Float16Module or not.
        hf: the checkpoint that they were built from; its config and tokenizer files are copied.
        directory: the target, on a file system that all ranks see; absent or empty.
        progress: show a progress bar.
        max_file_bytes: largest size of a file. A larger tensor gets a file for itself.
        merged: of models with an adapter, which is added to the weights; None for the weights as they are.
        more_files: text files to add, by name; rank 0 writes its own.

    Raises:
        UserError: on every rank; the target is not empty, or a file cannot be written. Nothing is left at the target.
    """
    directory = Path(directory)
    name: list[str | None] = [_partial_name(directory)]
    dist.broadcast_object_list(name, src=0, group=host_group())
    partial = directory.with_name(str(name[0]))
    with raise_on_all_ranks(), _failed_writes(directory):
        if dist.get_rank() == 0:
            _prepare(directory, partial)
    tied, table = hf.architecture.tied, hf.architecture.weights if merged is None else merged.table
    placed = [place for model in models for place in place_parameters(model, table, tied=tied)]
    weights = {entry.megatron for entry in hf.architecture.weights}
    placed = [place for place in placed if place.entry.megatron in weights]
    # The last stage's copy of a tied embedding is exported by the first stage.
    placed = [place for place in placed if not (tied and place.name == OUTPUT)]
    placed = [_in_source_dtype(place, hf) for place in placed if first_replica(place)]
    # The kinds of parameters are gathered over different groups. A rank may write those of one kind only.
    kinds = [
        [place for place in placed if (bool(place.entry.experts), place.entry.sliced) == kind]
        for kind in ((False, False), (True, False), (True, True))
    ]
    kinds[-1].sort(key=lambda place: (place.layer, place.entry.hf, place.expert))  # slices of a tensor in its order
    written = [assign_files(kind, max_file_bytes) if kind and _writes(kind[0]) else [] for kind in kinds]
    ranks: list[list[File]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, list(chain(*written)), group=host_group())
    names = file_names(sum(map(len, ranks)))

    errors, first = [], sum(map(len, ranks[: dist.get_rank()]))
    for kind, files in zip(kinds, written, strict=True):
        paths = [partial / name for name in names[first : first + len(files)]]
        first += len(files)
        places = track(kind, "exporting weights") if progress and kind else kind
        tensors = gathered(places, merged)
        if kind and kind[0].entry.sliced:
            tensors = _joined(tensors, kind[0].entry.experts)
        errors.append(_write_files(tensors, files, paths))
    try:
        with raise_on_all_ranks():
            if error := next(filter(None, errors), None):
                raise UserError(error)
        with raise_on_all_ranks(), _failed_writes(directory):
            if dist.get_rank() == 0:
                for file, text in (more_files or {}).items():
                    (partial / file).write_text(text, encoding="utf-8")
                _finish(hf, partial, directory, dict(zip(names, chain(*ranks), strict=True)))
    except UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _in_source_dtype(place: PlacedParameter, hf: HFCheckpoint) -> PlacedParameter:
    """A buffer, which training leaves, as the checkpoint has it: Megatron keeps it in fp32."""
    if isinstance(place.parameter, torch.nn.Parameter) or place.hf[0] not in hf.tensors:
        return place
    return replace(place, parameter=place.parameter.to(TORCH[hf.tensors[place.hf[0]].dtype]))


def _writes(place: PlacedParameter) -> bool:
    """Whether this rank writes the tensors of a parameter, all of whose ranks call this."""
    if place.entry.sliced and parallel_state.get_expert_model_parallel_rank() != 0:
        return False
    return place.group.rank() == 0


def assign_files(placed: Sequence[PlacedParameter], max_bytes: int) -> list[File]:
    """Assigns the tensors of these parameters, in their order, to files of at most `max_bytes`."""
    sizes: File = {}
    for place in placed:
        for parts in place.entry.tensors:
            name, _ = tensor_and_slice(place.hf[parts[0]])
            slices = place.entry.experts if place.entry.sliced else 1
            sizes[name] = slices * math.prod(place.entry.shape_of(parts)) * place.parameter.element_size()
    return [{name: sizes[name] for name in file} for file in split_tensors(sizes, max_bytes)]


def first_replica(place: PlacedParameter) -> bool:
    """Whether this rank belongs to the data-parallel replica that exports the parameter."""
    if place.entry.experts:
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def gathered(
    placed: Iterable[PlacedParameter], values: Callable[[PlacedParameter], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The whole Hugging Face tensors of these parameters, on the CPU.

    Collectives: one gather over `PlacedParameter.group` for every parameter that is split.

    Args:
        placed: the parameters.
        values: gives this rank's share of a parameter, in its shape and dtype; None for the parameter itself.

    Yields:
        Name and tensor on the first rank of the group; nothing on the other ranks.
    """
    for place in placed:
        group, rank, ranks = place.group, place.group.rank(), place.group.size()
        entry, parameter = place.entry, (place.parameter if values is None else values(place)).detach().contiguous()
        shards = [parameter]
        if entry.tp_dim is not None and ranks > 1:
            # As bytes, because gloo does not gather every dtype.
            local = parameter.view(torch.uint8)
            whole = [torch.empty_like(local) for _ in range(ranks)] if rank == 0 else None
            dist.gather(local, whole, group=group, group_dst=0)
            shards = [shard.view(parameter.dtype) for shard in whole or []]
        if rank != 0:
            continue
        whole = join_ranks(entry.part_layout, entry.rows, [shard.cpu() for shard in shards], entry.tp_dim)
        if entry.is_vocabulary:
            whole = whole[: entry.rows[0]]
        parts = entry.part_layout.split(whole, entry.rows)
        for held in entry.tensors:
            tensor = parts[held[0]] if len(held) == 1 else torch.cat([parts[part] for part in held])
            yield place.hf[held[0]], entry.as_stored(tensor, held).contiguous()


def _joined(slices: Iterator[tuple[str, Tensor]], experts: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold all experts of a layer, on the CPU; on the device is one slice of every rank at most.

    Collectives: one gather over the expert-parallel group for every expert of a rank.

    Args:
        slices: from `gathered`, those of one tensor behind each other.
        experts: of a layer, on all ranks.

    Yields:
        Name and tensor on the first rank of the group; nothing on the other ranks.
    """
    group: Any = parallel_state.get_expert_model_parallel_group()
    whole: Tensor | None = None
    for name, held in groupby(slices, lambda item: tensor_and_slice(item[0])[0]):
        for at, (_, local) in enumerate(held):
            shares = [local]
            if group.size() > 1:
                mine = local.view(torch.uint8).to(torch.cuda.current_device())  # gloo does not gather every dtype
                received = [torch.empty_like(mine) for _ in range(group.size())] if group.rank() == 0 else None
                dist.gather(mine, received, group=group, group_dst=0)
                shares = [share.view(local.dtype) for share in received or []]
            if group.rank() == 0:
                whole = local.new_empty(experts, *local.shape) if whole is None else whole
                whole[at :: experts // group.size()] = torch.stack(shares)
        if whole is not None:
            yield name, whole
            whole = None


def _write_files(tensors: Iterator[tuple[str, Tensor]], files: Sequence[File], paths: Sequence[Path]) -> str | None:
    """Writes the tensors into their files while they are gathered.

    All tensors are taken from the iterator, even after an error and on ranks that get none: every rank of the group
    must take part in each gather.

    Returns:
        The first error as a sentence, or None.
    """
    error = None
    for file, path in zip(files, paths, strict=True):
        held = dict(islice(tensors, len(file)))
        if not held or error is not None:
            continue
        try:
            path.parent.mkdir(
                exist_ok=True
            )  # exists on a shared file system; `_finish` finds out where it is not shared
            save_file(held, str(path), metadata={"format": "pt"})
            follow_umask(path)  # safetensors writes a temporary file that is the owner's alone
            held.clear()  # before the next file's tensors are gathered
        except Exception as failure:  # a full disk raises an OSError or a SafetensorError
            error = str(cannot_write(f"--export-hf: {path}", failure, "export elsewhere"))
    for _ in tensors:
        pass  # runs the remaining gathers, and ends the progress bar
    return error


def _prepare(directory: Path, partial: Path) -> None:
    """Makes the directory to write into, on rank 0."""
    check_empty("--export-hf", directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for path in directory.parent.iterdir():
        if path != partial and _was_left_behind(path, directory):
            shutil.rmtree(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()


def _partial_name(directory: Path) -> str:
    """The name of the directory that this process writes into: no other process uses it."""
    return f".{directory.name}.{socket.gethostname()}.{os.getpid()}.partial"


def _was_left_behind(path: Path, directory: Path) -> bool:
    """Whether a path is the partial directory of a process of this host that was killed."""
    start, end = f".{directory.name}.{socket.gethostname()}.", ".partial"
    if not path.name.startswith(start) or not path.name.endswith(end):
        return False
    pid = path.name[len(start) : -len(end)]
    return pid.isdecimal() and not psutil.pid_exists(int(pid))


def _finish(hf: HFCheckpoint, partial: Path, directory: Path, files: dict[str, File]) -> None:
    """Adds the index, the copied files and the record of all files, and renames the directory, on rank 0."""
    if missing := [name for name in files if not (partial / name).exists()]:
        raise UserError(
            f"{partial} lacks {missing[0]}, which another node wrote; export to a file system all nodes share"
        )
    if len(files) > 1:
        by_tensor = {tensor: name for name, file in files.items() for tensor in file}
        atomic_write(partial / INDEX, index_text(by_tensor, sum(sum(file.values()) for file in files.values())))
    for source in copied_files(hf.path):
        shutil.copyfile(source, partial / source.name)
    record_files(partial)
    for path in (*partial.iterdir(), partial):
        sync(path)
    os.replace(partial, directory)
    sync(directory.parent)


@contextlib.contextmanager
def _failed_writes(directory: Path) -> Iterator[None]:
    """Turns an OSError into a UserError."""
    try:
        yield
    except OSError as failure:
        raise cannot_write(f"--export-hf: {failure.filename or directory}", failure, "export elsewhere") from failure
