"""Qwen3 with experts, in every layer or in some: Qwen3-30B-A3B, Qwen3-235B-A22B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family, required
from simpo_megatron.models.families.biases import attention_bias_kwargs, bias_additions, bias_config, biased_weights
from simpo_megatron.models.families.moe import moe_feed_forward, moe_kwargs
from simpo_megatron.models.families.windows import window_size
from simpo_megatron.models.megatron_args import default_config, dense_layers, expert_config, sliding_window
from simpo_megatron.models.weight_table import WeightEntry


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    kwargs = moe_kwargs(
        config,
        ffn=required(config, "moe_intermediate_size"),
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        pattern=_pattern(config),
    )
    # Unlike Qwen3, transformers gives the window to all layers.
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return {**kwargs, **attention_bias_kwargs(config), **window_size(window), "qk_layernorm": True}


def _pattern(config: dict[str, Any]) -> list[bool]:
    """Whether each layer has experts (`Qwen3MoeDecoderLayer`)."""
    step, dense = required(config, "decoder_sparse_step"), config.get("mlp_only_layers") or ()
    layers = range(required(config, "num_hidden_layers"))
    return [layer not in dense and (layer + 1) % step == 0 for layer in layers]


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    experts = moe_feed_forward(
        config, ffn=required(config, "moe_intermediate_size"), block="mlp", pattern=_pattern(config)
    )
    return biased_weights(config, qk_norm=True, feed_forward=experts)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    biases = bias_config(args)
    if biases is None or not args.get("qk_layernorm") or not args.get("num_experts"):
        return None
    if args.get("window_attn_skip_freq"):
        return None
    window = {"use_sliding_window": True, **sliding_window(args)} if args.get("window_size") else {}
    experts = expert_config(args, number="num_experts", width="moe_intermediate_size")
    config = default_config(args, "qwen3_moe", "Qwen3Moe") | biases | window
    return config | experts | {"mlp_only_layers": dense_layers(args)}


QWEN3_MOE = Family(
    "Qwen3-MoE",
    ("qwen3_moe",),
    _transformer_kwargs,
    _weights,
    _config,
    additions=bias_additions,
    defaults={"decoder_sparse_step": 1},
)
