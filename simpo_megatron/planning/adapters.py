"""Bytes that autograd keeps of the adapters of one layer (`adapters/layer.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.adapters.lora import Lora, projections
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.weight_table import WeightEntry
from simpo_megatron.planning.activations import expert_tokens


def adapter_bytes(
    architecture: Architecture,
    layout: Mapping[str, Any],
    lora: Lora,
    *,
    layer: int,
    tokens: int,
    element: int,
    recomputed: frozenset[str] = frozenset(),
) -> float:
    """Bytes that autograd keeps of the adapters of one layer.

    Args:
        architecture: the model.
        layout: from `limits.layout_arguments`.
        lora: the adapters.
        layer: its global index.
        tokens: of this context-parallel rank.
        element: bytes of an activation.
        recomputed: from `activations.recomputed_modules`.
    """
    kept = 0.0
    for entry in architecture.weights:
        targets = len(set(projections(entry)) & set(lora.targets))
        again = ".mlp." in entry.megatron and ("moe" if entry.experts else "mlp") in recomputed
        if targets and entry.in_layer(layer) and not again:
            kept += _of_entry(entry, architecture, layout, lora, targets, tokens, element)
    return kept


def _of_entry(
    entry: WeightEntry,
    architecture: Architecture,
    layout: Mapping[str, Any],
    lora: Lora,
    targets: int,
    tokens: int,
    element: int,
) -> float:
    """Of one linear layer, or of that layer of all experts of a rank."""
    ranks = layout["tensor_model_parallel_size"]
    read, given = tokens / (ranks if layout["sequence_parallel"] else 1), float(tokens)  # by A, and to B
    if entry.tp_dim == 1:
        read, given = given, read
    if entry.experts:
        read = given = tokens * expert_tokens(architecture, layout)
        ranks = layout["expert_tensor_parallel_size"] or ranks
    columns = entry.shapes[0][1] // (ranks if entry.tp_dim == 1 else 1)
    kept = given * targets * lora.rank * element
    if lora.dropout:  # what dropout leaves for each projection, and the masks
        kept += read * targets * columns * (element + 1)
    if targets > 1:  # all A, stacked
        experts = max(1, entry.experts // layout["expert_model_parallel_size"])
        kept += experts * targets * lora.rank * columns * element
    return kept
