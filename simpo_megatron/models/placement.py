"""Which entry of the weight table each parameter of a built model belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from simpo_megatron.models.weight_table import EMBEDDING, OUTPUT, WeightEntry, canonical_name

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter of this rank, its entry of the table, and its global layer and expert (None where it has none)."""

    name: str
    parameter: torch.nn.Parameter
    weight: WeightEntry
    layer: int | None
    expert: int | None

    @property
    def hf(self) -> tuple[str, ...]:
        """The names of its parts in the checkpoint."""
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in self.weight.hf)

    @property
    def group(self) -> Any:
        """The tensor-parallel ranks among which it is split: those of the experts for an expert's weight."""
        if self.weight.experts:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()


def place_parameters(model: torch.nn.Module, table: Sequence[WeightEntry], *, tied: bool) -> Iterator[PlacedParameter]:
    """Pairs every parameter of a model, wrapped or not, with its entry.

    Args:
        model: a GPTModel of this rank.
        table: the weight table; a longer one where the model has more than its architecture says.
        tied: the output layer is the embedding. With pipeline stages the last one holds a copy.

    Raises:
        ValueError: a parameter without an entry, an entry of these layers without a parameter, or a shape that the entry
            does not give: the model was not built from this table.
    """
    gpt = unwrap(model)
    entries = {weight.megatron: weight for weight in table}
    if tied:
        entries[OUTPUT] = entries[EMBEDDING]
    decoder: Any = gpt.decoder
    layers = [layer.layer_number - 1 for layer in decoder.layers]
    missing = {
        (name, layer, expert)
        for name, weight in entries.items()
        if weight.per_layer
        for layer in layers
        for expert in (_local_experts(weight) if weight.experts else (None,))
    }
    for name, parameter in gpt.named_parameters():
        key, layer, expert = canonical_name(name), None, None
        if key.startswith("decoder.layers."):
            _, _, index, tail = key.split(".", 3)
            key, layer = f"decoder.layers.{{layer}}.{tail}", layers[int(index)]
        if found := _EXPERT.search(key):
            key = key.replace(found[0], ".local_experts.{expert}.")
            expert = _local_experts(entries[key])[int(found[1])] if key in entries else None
        missing.discard((key, layer, expert))
        if key not in entries:
            raise ValueError(f"the weight table has no entry for the parameter {name}")
        place = PlacedParameter(name, parameter, entries[key], layer, expert)
        _check_shape(place)
        yield place
    if missing:
        raise ValueError(f"the model has no parameter for {sorted(missing, key=str)}; was it built from this table?")


def _local_experts(weight: WeightEntry) -> range:
    """The global indices of the experts this rank holds: expert parallelism cuts them into equal runs."""
    share = weight.experts // parallel_state.get_expert_model_parallel_world_size()
    return range(share * parallel_state.get_expert_model_parallel_rank(), weight.experts)[:share]


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DDP and Float16Module."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


def _check_shape(place: PlacedParameter) -> None:
    """Compares a parameter with the sizes of its parts over the tensor-parallel ranks."""
    weight = place.weight
    whole = [sum(weight.rows), *weight.shapes[0][1:]]
    if weight.tp_dim is not None:
        whole[weight.tp_dim] //= place.group.size()
    found = list(place.parameter.shape)
    if found != whole and not (weight.is_vocabulary and found[0] >= whole[0] and found[1:] == whole[1:]):
        raise ValueError(f"{place.name} has shape {found} on this rank, but config.json gives {whole}")
