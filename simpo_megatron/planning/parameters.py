"""The parameters that a rank of each pipeline stage holds, counted from the weight table. The counts are exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.weight_table import EMBEDDING, WeightEntry
from simpo_megatron.parallel.stages import VOCAB_DIVISOR, padded_vocab_size, stage_layers


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank. Experts are counted apart, because other ranks hold copies of them than of the rest.

    Attributes:
        dense: outside experts.
        experts: of experts.
        trained_dense: those of `dense` that training changes, which have gradients and optimizer state.
        trained_experts: those of `experts` that training changes.
    """

    dense: int = 0
    experts: int = 0
    trained_dense: int = 0
    trained_experts: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts

    @property
    def trained(self) -> int:
        """Those that training changes."""
        return self.trained_dense + self.trained_experts

    def plus(self, entry: WeightEntry, count: int) -> Parameters:
        """With `count` parameters of this entry of the weight table more."""
        trained = count if entry.trained else 0
        if entry.experts:
            return replace(self, experts=self.experts + count, trained_experts=self.trained_experts + trained)
        return replace(self, dense=self.dense + count, trained_dense=self.trained_dense + trained)


def layers_of_stages(num_layers: int, layout: Mapping[str, Any]) -> list[list[range]]:
    """The global layers of every pipeline stage, a range for each of its virtual stages.

    Args:
        num_layers: of the model.
        layout: from `limits.layout_arguments`; it has passed `limits.check_layout`.
    """
    virtual = layout["virtual_pipeline_model_parallel_size"] or 1
    first, last = (layout[f"num_layers_in_{end}_pipeline_stage"] for end in ("first", "last"))
    return stage_layers(num_layers, layout["pipeline_model_parallel_size"], virtual, first, last)


def stage_parameters(
    architecture: Architecture,
    layout: Mapping[str, Any],
    divisible_by: int = VOCAB_DIVISOR,
    table: Sequence[WeightEntry] | None = None,
) -> list[Parameters]:
    """Parameters of a rank of each pipeline stage.

    Every stage holds its layers; the first one also the embedding, the last one the final norm and the output layer.

    Args:
        architecture: the model.
        layout: from `limits.layout_arguments`; it has passed `limits.check_layout`.
        divisible_by: `--make-vocab-size-divisible-by`.
        table: the weight table; None for that of the architecture.
    """
    stages = layers_of_stages(architecture.num_layers, layout)
    found = []
    for stage, chunks in enumerate(stages):
        first, last = stage == 0, stage == len(stages) - 1
        held = Parameters()
        for entry in architecture.weights if table is None else table:
            if entry.per_layer:
                copies = sum(entry.in_layer(layer) for layers in chunks for layer in layers)
                copies *= entry.experts // layout["expert_model_parallel_size"] if entry.experts else 1
            elif entry.megatron == EMBEDDING:
                # The last stage has a copy of a tied embedding, unless it is the first one too.
                copies = int(first or (last and architecture.tied))
            else:
                copies = int(last)
            held = held.plus(entry, copies * _rank_share(entry, layout, divisible_by))
        found.append(held)
    return found


def _rank_share(entry: WeightEntry, layout: Mapping[str, Any], divisible_by: int) -> int:
    """Numbers that one rank holds of one parameter of this entry."""
    tensor = layout["tensor_model_parallel_size"]
    ranks = (layout["expert_tensor_parallel_size"] or tensor) if entry.experts else tensor
    shapes = [list(shape) for shape in entry.shapes]
    if entry.is_vocabulary:
        shapes[0][0] = padded_vocab_size(shapes[0][0], tensor, divisible_by)
    return sum(map(math.prod, shapes)) // (1 if entry.tp_dim is None else ranks)
