"""Hugging Face weights into the parameters of this rank: every rank reads its own slices, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from rich.progress import track
from safetensors import safe_open
from torch import Tensor

from simpo_megatron.errors import UserError
from simpo_megatron.models.family import EMBEDDING, OUTPUT, Weight, canonical_name
from simpo_megatron.models.hf import HFModel, check_tensors
from simpo_megatron.models.layout import rank_slice, to_megatron


@dataclass(frozen=True)
class Placed:
    """A parameter of this rank, the table's row it belongs to, and the global layer it is in (None outside the layers)."""

    name: str
    parameter: Tensor
    weight: Weight
    layer: int | None

    @property
    def hf(self) -> tuple[str, ...]:
        return tuple(name.format(layer=self.layer) for name in self.weight.hf)


def load_hf_weights(models: Sequence[torch.nn.Module], hf: HFModel, progress: bool = False) -> None:
    """Fills every parameter of this rank's models, in their dtype and on their device; padded vocabulary rows become zero.

    No collectives: tied copies of the embedding on two stages are read twice.

    Args:
        models: from `build_model`, in order; wrapped by DDP or Float16Module or not.
        hf: the checkpoint they were built from.
        progress: show a progress bar.

    Raises:
        UserError: a tensor is missing, mis-shaped or unused; before the first weight is written.
        ValueError: the models were not built from `hf`.
    """
    check_tensors(hf)
    placed = [place for model in models for place in place_parameters(model, hf)]
    tensors = {name: hf.tensors[name].file for place in placed for name in place.hf}
    with ExitStack() as stack, torch.no_grad():
        files = {file: stack.enter_context(_open(file)) for file in sorted(set(tensors.values()))}
        for place in track(placed, "loading weights") if progress else placed:
            _fill(place, {name: files[tensors[name]].get_slice(name) for name in place.hf})


def place_parameters(model: torch.nn.Module, hf: HFModel) -> Iterator[Placed]:
    """Pairs every parameter of a model with its row of the weight table.

    Raises:
        ValueError: a parameter without a row, a row of these layers without a parameter, or a shape the row does not give.
    """
    gpt = unwrap(model)
    table = {weight.megatron: weight for weight in hf.weights}
    if hf.tied:  # with pipeline stages the last one holds a copy
        table[OUTPUT] = table[EMBEDDING]
    layers: list[int] = [layer.layer_number - 1 for layer in gpt.decoder.layers]  # type: ignore[attr-defined, union-attr]
    rows: set[tuple[str, int | None]] = {(name, layer) for name in table for layer in layers if table[name].per_layer}
    for name, parameter in gpt.named_parameters():
        key, layer = canonical_name(name), None
        if name.startswith("decoder.layers."):
            head, index, tail = key.removeprefix("decoder.").split(".", 2)
            key, layer = f"decoder.{head}.{{layer}}.{tail}", layers[int(index)]
            rows.discard((key, layer))
        if key not in table:
            raise ValueError(f"the weight table of {hf.family.name} has no row for the parameter {name}")
        place = Placed(name, parameter, table[key], layer)
        _check_shape(place)
        yield place
    if rows:
        raise ValueError(f"the model has no parameter for {sorted(map(str, rows))}; was it built from {hf.path}?")


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DDP and Float16Module."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


def is_vocabulary(weight: Weight) -> bool:
    """Whether the first dimension is the vocabulary, which Megatron pads."""
    return weight.megatron in (EMBEDDING, OUTPUT)


def _check_shape(place: Placed) -> None:
    """Compares a parameter with the sizes of its parts over the tensor-parallel ranks."""
    weight, dim = place.weight, place.weight.tp_dim
    whole = list(weight.shapes[0])
    if weight.layout != "copy":
        whole[0] = sum(shape[0] for shape in weight.shapes)
    if dim is not None:
        whole[dim] //= parallel_state.get_tensor_model_parallel_world_size()
    found = list(place.parameter.shape)
    if found != whole and not (is_vocabulary(weight) and found[0] >= whole[0] and found[1:] == whole[1:]):
        raise ValueError(f"{place.name} has shape {found} on this rank, but the checkpoint gives {whole}")


def _fill(place: Placed, slices: dict[str, Any]) -> None:
    """Reads a rank's slices of the parts and copies them into its parameter."""
    weight, parameter, dim = place.weight, place.parameter, place.weight.tp_dim
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    parts = []
    for name, shape in zip(place.hf, weight.shapes, strict=True):
        index = [slice(None)] * len(shape)
        if dim is not None:
            padded = parameter.shape[0] * ranks if is_vocabulary(weight) else shape[dim]
            index[dim] = rank_slice(shape[dim], padded, rank, ranks)
        parts.append(slices[name][tuple(index)])
    if is_vocabulary(weight):
        rows = parts[0].shape[0]
        parameter[:rows].copy_(parts[0])
        parameter[rows:].zero_()
    else:
        parameter.copy_(to_megatron(weight, parts, ranks))


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except Exception as error:  # safetensors raises its own type, OSError and others
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
