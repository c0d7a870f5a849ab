"""The parameters of all ranks as a Hugging Face checkpoint: the way back of load.py.

One rank of every tensor-parallel group writes files of its own, and so does one of every group of ranks that share experts: no
rank ever holds more than one file (5 GiB) of whole tensors. All is written into a directory next to the target, which takes
the target's name only when every file is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write, sync
from simpo_megatron.models.hf_checkpoint import (
    INDEX,
    MAX_FILE_BYTES,
    HFCheckpoint,
    copied_files,
    file_names,
    index_text,
    split_files,
)
from simpo_megatron.models.placement import PlacedParameter, place_parameters
from simpo_megatron.models.weight_table import OUTPUT

# One file: its tensors by name, with their bytes.
File = dict[str, int]


def export_hf(
    models: Sequence[torch.nn.Module],
    hf: HFCheckpoint,
    directory: Path,
    progress: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes the models as a checkpoint transformers reads, in the dtype of the parameters. Every rank calls it.

    Collectives: over all ranks two broadcasts and two gathers of small objects; over one group of tensor-parallel ranks (for
    experts, of expert-tensor-parallel ranks) among the replicas one gather for every parameter that is split.

    Args:
        models: this rank's, wrapped by DDP or Float16Module or not.
        hf: the checkpoint they were built from; its config and tokenizer files are copied.
        directory: the target, on a file system all ranks see; absent or empty.
        progress: show a progress bar.
        max_file_bytes: no file gets larger, unless one tensor is.

    Raises:
        UserError: the target is not empty, or a file cannot be written; on every rank, with nothing left at the target.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    _on_first_rank(lambda: _prepare(directory, partial))
    tied = hf.architecture.tied
    placed = [place for model in models for place in place_parameters(model, hf.architecture.weights, tied=tied)]
    # The last stage's copy of a tied embedding is exported by the first stage.
    placed = [place for place in placed if not (tied and place.name == OUTPUT)]
    placed = [place for place in placed if _first_replica(place)]
    # Experts and the rest are gathered over different groups, so that a rank may write one of them and not the other.
    halves = [[place for place in placed if bool(place.weight.experts) == experts] for experts in (False, True)]
    written = [plan_files(half, max_file_bytes) if half and half[0].group.rank() == 0 else [] for half in halves]
    ranks: list[list[File]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, [*written[0], *written[1]])
    names = file_names(sum(map(len, ranks)))

    errors, first = [], sum(map(len, ranks[: dist.get_rank()]))
    for half, files in zip(halves, written, strict=True):
        paths = [partial / name for name in names[first : first + len(files)]]
        first += len(files)
        places = track(half, "exporting weights") if progress and half else half
        errors.append(_write_files(_gathered(places), files, paths))
    error = next(filter(None, errors), None)
    _raise_first_error(error, partial)
    try:
        _on_first_rank(lambda: _finish(hf, partial, directory, dict(zip(names, chain(*ranks), strict=True))))
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_target(directory: Path) -> None:
    """Refuses a target that holds something; `export_hf` does so too, but only after the training it ends.

    Raises:
        UserError: the target is neither absent nor an empty directory.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty; export to a new directory, or remove it")


def plan_files(placed: Sequence[PlacedParameter], max_bytes: int) -> list[File]:
    """Cuts the tensors of these parameters, in their order, into files of at most `max_bytes`."""
    tensors = [
        (name, torch.Size(shape).numel() * place.parameter.element_size())
        for place in placed
        for name, shape in zip(place.hf, place.weight.shapes, strict=True)
    ]
    files = split_files([size for _, size in tensors], max_bytes)
    return [dict(tensors[position] for position in file) for file in files]


def _first_replica(place: PlacedParameter) -> bool:
    """Whether this rank's group is the one among the data-parallel replicas that exports the parameter."""
    if place.weight.experts:
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _gathered(placed: Iterable[PlacedParameter]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of these parameters, whole and on the CPU, on the first rank of their groups; nothing on the
    others.

    Collectives: one gather over `PlacedParameter.group` for every parameter that is split.
    """
    for place in placed:
        group, rank, ranks = place.group, place.group.rank(), place.group.size()
        weight, parameter = place.weight, place.parameter.detach().contiguous()
        shards = [parameter]
        if weight.tp_dim is not None and ranks > 1:
            # As bytes: gloo does not gather every dtype.
            local = parameter.view(torch.uint8)
            whole = [torch.empty_like(local) for _ in range(ranks)] if rank == 0 else None
            dist.gather(local, whole, group=group, group_dst=0)
            shards = [shard.view(parameter.dtype) for shard in whole or []]
        if rank != 0:
            continue
        parts = [weight.part_layout.split(shard.cpu(), weight.rows, ranks) for shard in shards]
        for name, shape, *slices in zip(place.hf, weight.shapes, *parts, strict=True):
            tensor = slices[0] if weight.tp_dim is None else torch.cat(slices, dim=weight.tp_dim)
            if weight.is_vocabulary:
                tensor = tensor[: shape[0]]
            yield name, tensor.contiguous()


def _write_files(tensors: Iterator[tuple[str, Tensor]], files: Sequence[File], paths: Sequence[Path]) -> str | None:
    """Writes the tensors into their files as they come; returns what went wrong.

    After an error the rest is still taken from the iterator, because the other ranks of the group gather with this one;
    they take it too, though for them it ends without a tensor.
    """
    error = None
    for file, path in zip(files, paths, strict=True):
        held = dict(islice(tensors, len(file)))
        if not held or error is not None:
            continue
        try:
            path.parent.mkdir(exist_ok=True)  # there already on a shared file system; `_finish` tells where it is none
            save_file(held, str(path), metadata={"format": "pt"})
        except Exception as failure:  # a full disk is an OSError here and a SafetensorError there
            error = f"{path} cannot be written ({failure}); free space on that file system, or export elsewhere"
    for _ in tensors:
        pass  # nothing is left, but the progress bar sees the end
    return error


def _prepare(directory: Path, partial: Path) -> None:
    """Makes the directory to write into."""
    check_target(directory)
    if partial.exists():
        shutil.rmtree(partial)  # of an export that was cut off
    partial.mkdir(parents=True)


def _finish(hf: HFCheckpoint, partial: Path, directory: Path, files: dict[str, File]) -> None:
    """Adds the index and what is copied, and gives the directory its name."""
    if missing := [name for name in files if not (partial / name).exists()]:
        raise UserError(
            f"{partial} lacks {missing[0]}, which another node wrote; export to a file system all nodes share"
        )
    if len(files) > 1:
        by_tensor = {tensor: name for name, file in files.items() for tensor in file}
        atomic_write(partial / INDEX, index_text(by_tensor, sum(sum(file.values()) for file in files.values())))
    for source in copied_files(hf.path):
        shutil.copyfile(source, partial / source.name)
    for file in partial.iterdir():
        sync(file)
    os.replace(partial, directory)
    sync(directory.parent)


def _on_first_rank(action: Callable[[], None]) -> None:
    """Runs `action` on global rank 0; its error is raised everywhere. Collectives: one broadcast of a sentence."""
    error: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as failure:
            error = [str(failure)]
        except OSError as failure:
            error = [f"the export cannot be written ({failure}); check the space and the permissions there"]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise UserError(error[0])


def _raise_first_error(error: str | None, partial: Path) -> None:
    """Raises the first error everywhere, after removing what was written. Collectives: one gather of sentences."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next((message for message in errors if message is not None), None):
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(first)
