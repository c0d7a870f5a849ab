"""Hugging Face weights -> the parameters of this rank. Every rank reads only its own slices of the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open

from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, check_tensors
from simpo_megatron.models.placement import PlacedParameter, place_parameters
from simpo_megatron.models.weight_table import WeightEntry, tensor_and_slice


def load_hf_weights(
    models: Sequence[torch.nn.Module],
    hf: HFCheckpoint,
    progress: bool = False,
    table: Sequence[WeightEntry] | None = None,
) -> None:
    """Fills every parameter of this rank's models, in its dtype and on its device. Rows of padding become zero.

    No collectives: where an embedding is tied, the first and the last stage both read it.

    Args:
        models: from `build_model`, in order; wrapped by DDP or Float16Module or not.
        hf: the checkpoint that they were built from.
        progress: show a progress bar.
        table: the weight table, with an entry for every parameter of the models; None for that of the architecture.

    Raises:
        UserError: a tensor is missing, mis-shaped or unused. Nothing has been loaded then.
        ValueError: the models were not built from this table.
    """
    table = hf.architecture.weights if table is None else table
    check_tensors(hf, table)
    placed = [place for model in models for place in place_parameters(model, table, tied=hf.architecture.tied)]
    used = {hf.tensors[name].file for place in placed for name in place.hf}
    with ExitStack() as stack, torch.no_grad():
        files = {file: stack.enter_context(_open(file)) for file in sorted(used)}
        for place in track(placed, "loading weights") if progress else placed:
            _fill(place, _tensors(place, hf, files))


def _tensors(place: PlacedParameter, hf: HFCheckpoint, files: Mapping[Path, Any]) -> dict[str, Any]:
    """The tensors of a parameter by name, rows first: lazily read ones of safetensors, or read ones."""
    found = {}
    for held in place.entry.tensors:
        name = place.hf[held[0]]
        tensor, index = tensor_and_slice(name)
        lazy = files[hf.tensors[name].file].get_slice(tensor)
        if index is not None:
            lazy = lazy[index]
        found[name] = place.entry.rows_first(lazy[:], held) if place.entry.transposed else lazy
    return found


def _fill(place: PlacedParameter, slices: dict[str, Any]) -> None:
    """Reads this rank's rows of the parts into its parameter.

    Args:
        place: the parameter.
        slices: from `_tensors`.
    """
    entry, parameter, filled = place.entry, place.parameter, 0
    for run in place.runs():
        first, filled = entry.first_row(run.part), run.offset + run.last - run.first
        index: Any = slice(first + run.first, first + run.last)
        if entry.tp_dim == 1:
            index = (index, place.columns)
        parameter[run.offset : filled].copy_(slices[place.hf[run.part]][index])
    parameter[filled:].zero_()  # padding of the vocabulary


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except Exception as error:  # safetensors raises its own type, OSError and others
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
