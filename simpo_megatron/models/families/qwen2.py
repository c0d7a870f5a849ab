"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from functools import partial
from typing import Any

from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.family import Family, refuse


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "use_sliding_window", False, None, mend="set it to false, which is exact up to the window's length")
    return {**dense_kwargs(config), "add_qkv_bias": True}


QWEN2 = Family("Qwen2 and Qwen2.5", ("qwen2",), _transformer_kwargs, partial(dense_weights, qkv_bias=True))
