"""Floating-point operations of a step: those that the model needs, whatever a layout pads or computes again.

    flops = step_flops(architecture, prompt, [chosen, rejected])     # lengths of the pairs of a global batch

A product of [m, k] and [k, n] is 2 * m * k * n operations. Matrices and attention are counted; norms, activations and
the embedding are not. Frozen weights under adapters need no gradient of theirs: their backward pass is one forward
pass. A query attends to the keys before it in its own sequence, and to itself: attention over a packed
row is the sum over its sequences. The output layer is counted at the positions that are scored. A backward pass is
twice a forward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.weight_table import WeightEntry


def forward_flops(architecture: Architecture, tokens: int, attended: int, scored: int) -> int:
    """Operations of a forward pass.

    Args:
        architecture: of the model.
        tokens: that go through the layers.
        attended: pairs of a query and a key that it attends to, in one head, summed over the layers.
        scored: tokens that go through the output layer.
    """
    model: dict[str, Any] = architecture.transformer
    matrices = sum(
        sum(math.prod(shape) for shape in entry.shapes if len(shape) > 1)
        * sum(map(entry.in_layer, range(architecture.num_layers)))
        * (model["moe_router_topk"] if entry.experts else 1)
        for entry in architecture.weights
        if not entry.is_vocabulary
    )
    widths = model["kv_channels"] + architecture.value_head_dim  # of the scores, and of the sum of values
    attention = 2 * attended * model["num_attention_heads"] * widths
    return 2 * tokens * matrices + attention + 2 * scored * model["hidden_size"] * architecture.vocab_size


def attended_keys(lengths: np.ndarray, window: int | None = None) -> np.ndarray:
    """Pairs of a query and a key that it attends to, in causal sequences of these lengths.

    Args:
        lengths: of the sequences.
        window: keys that a query attends to at most; None for all.

    >>> attended_keys(np.array([3, 4]), window=2).tolist()
    [5, 7]
    """
    full = lengths.astype(np.int64)
    near = full if window is None else np.minimum(full, window)
    return near * (near + 1) // 2 + (full - near) * near


def step_flops(
    architecture: Architecture,
    prompt: np.ndarray,
    responses: Sequence[np.ndarray],
    share_prompts: bool = False,
    table: Sequence[WeightEntry] | None = None,
) -> int:
    """Operations of a training step, forward and backward, without what is recomputed.

    Args:
        architecture: of the model.
        prompt: tokens of the prompt of every pair of the global batch.
        responses: tokens of the responses of every pair: chosen, or chosen and rejected.
        share_prompts: the prompt of a pair is computed once.
        table: the weight table of a run with adapters; None where all weights are trained.
    """
    windows = Counter(architecture.windows)
    tokens = attended = 0
    for first, response in enumerate(responses):
        shared = share_prompts and first > 0
        tokens += int((response if shared else prompt + response).sum())
        for window, layers in windows.items():
            keys = attended_keys(prompt + response, window)
            attended += layers * int((keys - attended_keys(prompt, window) if shared else keys).sum())
    scored = int(sum(response.sum() for response in responses))
    forward = forward_flops(architecture, tokens, attended, scored)
    if table is None:
        return 3 * forward
    attention = forward_flops(architecture, 0, attended, 0)  # it has no weights: its backward pass stays twice as long
    return 2 * forward + attention + 3 * 2 * tokens * _adapter_parameters(architecture, table)


def _adapter_parameters(architecture: Architecture, table: Sequence[WeightEntry]) -> int:
    """Parameters of adapters that a token goes through: of experts those that it is sent to."""
    total = 0
    for entry in table:
        if entry.trained:
            chosen = architecture.transformer["moe_router_topk"] if entry.experts else 1
            layers = sum(map(entry.in_layer, range(architecture.num_layers)))
            total += layers * sum(map(math.prod, entry.shapes)) * chosen
    return total
