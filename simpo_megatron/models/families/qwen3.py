"""Qwen3, dense: Llama with a norm on every query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family, refuse
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights, refuse_sliding_window
from simpo_megatron.models.megatron_args import default_config
from simpo_megatron.models.weight_table import WeightEntry


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse_sliding_window(config)
    refuse(config, "attention_bias", False, None, fix="only Qwen3 models without biases run")
    # Qwen3's heads are 128 wide by default, independent of the hidden size.
    return {**dense_kwargs({"head_dim": 128, **config}), "qk_layernorm": True}


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    return dense_weights({"head_dim": 128, **config}, qk_norm=True)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if not args.get("qk_layernorm") or args.get("num_experts") or args.get("window_size"):
        return None
    return default_config(args, "qwen3", "Qwen3")


QWEN3 = Family("Qwen3", ("qwen3",), _transformer_kwargs, _weights, _config)
