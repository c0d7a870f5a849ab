"""Qwen3 with experts in every layer: Qwen3-30B-A3B, Qwen3-235B-A22B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family, refuse, required
from simpo_megatron.models.families.dense import dense_weights, refuse_sliding_window
from simpo_megatron.models.families.moe import moe_feed_forward, moe_kwargs
from simpo_megatron.models.megatron_args import default_config, expert_config
from simpo_megatron.models.weight_table import WeightEntry


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse_sliding_window(config)
    refuse(config, "attention_bias", False, None, fix="only Qwen3 models without biases run")
    refuse(config, "decoder_sparse_step", 1, fix="only models with experts in every layer run")
    refuse(config, "mlp_only_layers", [], None, fix="only models with experts in every layer run")
    kwargs = moe_kwargs(
        config, ffn=required(config, "moe_intermediate_size"), norm_topk_prob=bool(config.get("norm_topk_prob", False))
    )
    return {**kwargs, "qk_layernorm": True}


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    experts = moe_feed_forward(config, ffn=required(config, "moe_intermediate_size"), block="mlp")
    return dense_weights(config, qk_norm=True, feed_forward=experts)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if not args.get("qk_layernorm") or not args.get("num_experts") or args.get("window_size"):
        return None
    experts = expert_config(args, number="num_experts", width="moe_intermediate_size")
    return default_config(args, "qwen3_moe", "Qwen3Moe") | experts


QWEN3_MOE = Family("Qwen3-MoE", ("qwen3_moe",), _transformer_kwargs, _weights, _config)
