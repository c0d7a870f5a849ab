"""The base weights of a rank with the adapter added, for `export_hf`.

A rank has all that its share of a merged weight needs: of the two factors one is cut as the weight is, and the other is
whole. So nothing is sent. The sum is taken in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.adapters.layer import LinearAdapter
from simpo_megatron.adapters.lora import projections
from simpo_megatron.models.placement import PlacedParameter, unwrap
from simpo_megatron.models.weight_table import WeightEntry


class MergedWeights:
    """The base weights of this rank with the adapter added; `export_hf` takes it.

    Args:
        models: of this rank, with an adapter.

    Attributes:
        table: the weight table of the models.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        self.table: Sequence[WeightEntry] = unwrap(models[0]).table  # type: ignore[assignment]
        self._linears: dict[int, tuple[LinearAdapter, str]] = {
            id(parameter): (module.adapter, name.removeprefix("weight"))
            for model in models
            for module in model.modules()
            if isinstance(getattr(module, "adapter", None), LinearAdapter)
            for name, parameter in module.named_parameters(recurse=False)
            if name.startswith("weight")
        }

    def __call__(self, place: PlacedParameter) -> Tensor:
        """See `export.Merged`."""
        weight = place.parameter.detach()
        if id(place.parameter) not in self._linears:
            return weight
        adapter, suffix = self._linears[id(place.parameter)]
        return (weight.float() + delta(adapter, suffix)).to(weight.dtype)


@torch.no_grad()
def delta(adapter: LinearAdapter, suffix: str = "") -> Tensor:
    """What an adapter adds to this rank's share of the base weight, in fp32.

    Args:
        adapter: of the layer.
        suffix: of the expert in a grouped layer; else empty.
    """
    entry, ranks, parts = adapter.entry, adapter.group.size(), []
    for target, (rows, columns) in zip(projections(entry), entry.shapes, strict=True):
        if target in adapter.targets:
            a, b = (getattr(adapter, f"{target}_{factor}{suffix}").float() for factor in "ab")
            parts.append(adapter.scale * (b @ a))
        else:
            parts.append(torch.zeros(rows // ranks, columns, device=next(adapter.parameters()).device))
    return entry.part_layout.join(parts, ranks)
