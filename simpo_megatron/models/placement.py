"""The parameters of a built model, each with its entry of the weight table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from simpo_megatron.models.part_layout import Run, rank_runs, rank_slice
from simpo_megatron.models.weight_table import EMBEDDING, OUTPUT, WeightEntry, canonical_name

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter of this rank.

    Attributes:
        name: in the model.
        parameter: the parameter itself; a buffer where no run trains it.
        entry: its entry of the weight table.
        layer: its global layer index; None outside the layers.
        expert: its global expert index; None where it does not belong to an expert.
    """

    name: str
    parameter: torch.nn.Parameter | torch.Tensor
    entry: WeightEntry
    layer: int | None
    expert: int | None

    @property
    def hf(self) -> tuple[str, ...]:
        """The names of its parts in the checkpoint."""
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in self.entry.hf)

    @property
    def columns(self) -> slice:
        """What this rank holds of the second dimension, where tensor parallelism splits that one."""
        size, ranks = self.entry.shapes[0][1], self.group.size()
        return rank_slice(size, size, self.group.rank(), ranks) if self.entry.tp_dim == 1 else slice(None)

    def runs(self) -> Iterator[Run]:
        """This rank's parameter as runs of rows of whole parts. Those that pad the vocabulary are left out."""
        entry, rank, ranks = self.entry, self.group.rank(), self.group.size()
        if entry.is_vocabulary:
            held = rank_slice(entry.rows[0], self.parameter.shape[0] * ranks, rank, ranks)
            yield Run(0, 0, held.start, held.stop)
        elif entry.tp_dim == 0:
            yield from rank_runs(entry.part_layout, entry.rows, rank, ranks)
        else:
            yield from entry.part_layout.runs(entry.rows)

    @property
    def group(self) -> Any:
        """The ranks that it is split over: the tensor-parallel, for an expert the expert-tensor-parallel ones."""
        if self.entry.experts:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()


def place_parameters(model: torch.nn.Module, table: Sequence[WeightEntry], *, tied: bool) -> Iterator[PlacedParameter]:
    """Finds the entry of every parameter of a model.

    Args:
        model: a GPTModel of this rank, wrapped by DDP or Float16Module or not.
        table: the weight table; longer than the architecture's where the model has adapters.
        tied: whether the output layer is the embedding. The last of several pipeline stages then holds a copy of it.

    Raises:
        ValueError: the model was not built from this table: a parameter has no entry, an entry of these layers has no
            parameter, or a shape differs.
    """
    gpt = unwrap(model)
    entries = {entry.megatron: entry for entry in table}
    if tied:
        entries[OUTPUT] = entries[EMBEDDING]
    decoder: Any = gpt.decoder
    layers = [layer.layer_number - 1 for layer in decoder.layers]
    missing = {
        (name, layer, expert)
        for name, entry in entries.items()
        for layer in filter(entry.in_layer, layers)
        for expert in (_local_experts(entry) if entry.experts else (None,))
    }
    for name, parameter in chain(gpt.named_parameters(), gpt.named_buffers()):
        key, layer, expert = canonical_name(name), None, None
        if key.startswith("decoder.layers."):
            _, _, index, tail = key.split(".", 3)
            key, layer = f"decoder.layers.{{layer}}.{tail}", layers[int(index)]
        if found := _EXPERT.search(key):
            key = key.replace(found[0], ".local_experts.{expert}.")
            expert = _local_experts(entries[key])[int(found[1])] if key in entries else None
        missing.discard((key, layer, expert))
        if key not in entries:
            if not isinstance(parameter, torch.nn.Parameter):
                continue  # a table of angles, a counter
            raise ValueError(f"the weight table has no entry for the parameter {name}")
        place = PlacedParameter(name, parameter, entries[key], layer, expert)
        _check_shape(place)
        yield place
    if missing:
        raise ValueError(f"the model has no parameter for {sorted(missing, key=str)}; was it built from this table?")


def _local_experts(entry: WeightEntry) -> range:
    """The global indices of this rank's experts: expert parallelism gives every rank as many consecutive ones."""
    share = entry.experts // parallel_state.get_expert_model_parallel_world_size()
    return range(share * parallel_state.get_expert_model_parallel_rank(), entry.experts)[:share]


def count_once(parameter: Any, group: Any) -> None:
    """Lets the gradient norm count a parameter of an expert that all ranks of its group hold whole.

    Megatron counts a whole parameter on the first tensor-parallel rank, and the ranks that share an expert may be
    others. A parameter with `shared` is not counted (`optimizer.py`, get_main_grads_for_grad_norm).

    Args:
        parameter: it is marked.
        group: `PlacedParameter.group`.
    """
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, -1, 1
    parameter.shared = group.rank() > 0


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DDP and Float16Module."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


def _check_shape(place: PlacedParameter) -> None:
    """Compares the shape of a parameter with the shapes of its parts, divided over the tensor-parallel ranks."""
    entry = place.entry
    expected = [sum(entry.rows), *entry.shapes[0][1:]]
    if entry.tp_dim is not None:
        expected[entry.tp_dim] //= place.group.size()
    found = list(place.parameter.shape)
    if found != expected and not (entry.is_vocabulary and found[0] >= expected[0] and found[1:] == expected[1:]):
        raise ValueError(f"{place.name} has shape {found} on this rank, but config.json gives {expected}")
