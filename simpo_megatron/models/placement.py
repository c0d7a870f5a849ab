"""Which row of the weight table each parameter of a built model belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from simpo_megatron.models.family import EMBEDDING, OUTPUT, Weight, canonical_name
from simpo_megatron.models.hf_checkpoint import HFCheckpoint

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter of this rank, its row of the table, and its global layer and expert (None where it has none)."""

    name: str
    parameter: torch.nn.Parameter
    weight: Weight
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


def place_parameters(model: torch.nn.Module, hf: HFCheckpoint) -> Iterator[PlacedParameter]:
    """Pairs every parameter of a model, wrapped or not, with its row.

    Raises:
        ValueError: a parameter without a row, a row of these layers without a parameter, or a shape the row does not
            give: the model was not built from `hf`.
    """
    gpt = unwrap(model)
    table = {weight.megatron: weight for weight in hf.weights}
    if hf.tied:  # with pipeline stages the last one holds a copy
        table[OUTPUT] = table[EMBEDDING]
    decoder: Any = gpt.decoder
    layers = [layer.layer_number - 1 for layer in decoder.layers]
    missing = {
        (name, layer, expert)
        for name, weight in table.items()
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
            expert = _local_experts(table[key])[int(found[1])] if key in table else None
        missing.discard((key, layer, expert))
        if key not in table:
            raise ValueError(f"the weight table of {hf.family.name} has no row for the parameter {name}")
        place = PlacedParameter(name, parameter, table[key], layer, expert)
        _check_shape(place)
        yield place
    if missing:
        raise ValueError(f"the model has no parameter for {sorted(missing, key=str)}; was it built from {hf.path}?")


def _local_experts(weight: Weight) -> range:
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
    whole = list(weight.shapes[0])
    if weight.layout != "copy":
        whole[0] = sum(shape[0] for shape in weight.shapes)
    if weight.tp_dim is not None:
        whole[weight.tp_dim] //= place.group.size()
    found = list(place.parameter.shape)
    if found != whole and not (weight.is_vocabulary and found[0] >= whole[0] and found[1:] == whole[1:]):
        raise ValueError(f"{place.name} has shape {found} on this rank, but config.json gives {whole}")
