"""Qwen3, dense: Llama with a norm on every query and key head; some layers may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family
from simpo_megatron.models.families.biases import attention_bias_kwargs, bias_additions, bias_config, biased_weights
from simpo_megatron.models.families.dense import dense_kwargs
from simpo_megatron.models.families.windows import qwen_window_config, qwen_windows
from simpo_megatron.models.megatron_args import default_config
from simpo_megatron.models.weight_table import WeightEntry


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    of_all = dense_kwargs({**config, "layer_types": None})
    return {**of_all, **attention_bias_kwargs(config), **qwen_windows(config), "qk_layernorm": True}


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    return biased_weights(config, qk_norm=True)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    biases = bias_config(args)
    if biases is None or not args.get("qk_layernorm") or args.get("num_experts"):
        return None
    return default_config(args, "qwen3", "Qwen3") | biases | qwen_window_config(args)


QWEN3 = Family(
    "Qwen3",
    ("qwen3",),
    _transformer_kwargs,
    _weights,
    _config,
    additions=bias_additions,
    defaults={"head_dim": 128},  # independent of the hidden size
)
