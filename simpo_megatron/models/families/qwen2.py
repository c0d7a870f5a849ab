"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections; some layers may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from simpo_megatron.models.architecture import Family
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.families.windows import qwen_window_config, qwen_windows
from simpo_megatron.models.megatron_args import default_config


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    return {**dense_kwargs({**config, "layer_types": None}), **qwen_windows(config), "add_qkv_bias": True}


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    others = ("num_experts", "qk_layernorm", "attention_output_bias")
    if not args.get("add_qkv_bias") or any(args.get(name) for name in others):
        return None
    return default_config(args, "qwen2", "Qwen2") | qwen_window_config(args)


QWEN2 = Family("Qwen2 and Qwen2.5", ("qwen2",), _transformer_kwargs, partial(dense_weights, qkv_bias=True), _config)
