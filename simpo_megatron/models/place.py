"""Which row of the weight table each parameter of a built model belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from simpo_megatron.models.family import EMBEDDING, OUTPUT, Weight, canonical_name
from simpo_megatron.models.hf import HFModel


@dataclass(frozen=True)
class Placed:
    """A parameter of this rank, its row of the table, and its global layer (None outside the layers)."""

    name: str
    parameter: torch.nn.Parameter
    weight: Weight
    layer: int | None

    @property
    def hf(self) -> tuple[str, ...]:
        """The names of its parts in the checkpoint."""
        return tuple(name.format(layer=self.layer) for name in self.weight.hf)


def place_parameters(model: torch.nn.Module, hf: HFModel) -> Iterator[Placed]:
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
    missing = {(name, layer) for name in table if table[name].per_layer for layer in layers}
    for name, parameter in gpt.named_parameters():
        key, layer = canonical_name(name), None
        if key.startswith("decoder.layers."):
            _, _, index, tail = key.split(".", 3)
            key, layer = f"decoder.layers.{{layer}}.{tail}", layers[int(index)]
            missing.discard((key, layer))
        if key not in table:
            raise ValueError(f"the weight table of {hf.family.name} has no row for the parameter {name}")
        place = Placed(name, parameter, table[key], layer)
        _check_shape(place)
        yield place
    if missing:
        raise ValueError(f"the model has no parameter for {sorted(missing)}; was it built from {hf.path}?")


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DDP and Float16Module."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


def _check_shape(place: Placed) -> None:
    """Compares a parameter with the sizes of its parts over the tensor-parallel ranks."""
    weight = place.weight
    whole = list(weight.shapes[0])
    if weight.layout != "copy":
        whole[0] = sum(shape[0] for shape in weight.shapes)
    if weight.tp_dim is not None:
        whole[weight.tp_dim] //= parallel_state.get_tensor_model_parallel_world_size()
    found = list(place.parameter.shape)
    if found != whole and not (weight.is_vocabulary and found[0] >= whole[0] and found[1:] == whole[1:]):
        raise ValueError(f"{place.name} has shape {found} on this rank, but config.json gives {whole}")
