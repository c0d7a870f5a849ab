"""Mixtral 8x7B and 8x22B: Mistral's attention, and experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family, refuse, required
from simpo_megatron.models.families.dense import dense_weights
from simpo_megatron.models.families.moe import moe_feed_forward, moe_kwargs
from simpo_megatron.models.families.windows import window_size
from simpo_megatron.models.megatron_args import default_config, expert_config, sliding_window
from simpo_megatron.models.weight_table import WeightEntry


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse(
        config,
        "router_jitter_noise",
        0.0,
        0,
        None,
        fix="set it to 0, so that both responses of a pair are routed alike",
    )
    kwargs = moe_kwargs(config, ffn=required(config, "intermediate_size"), norm_topk_prob=True)
    return {**kwargs, **window_size(config.get("sliding_window"))}


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    experts = moe_feed_forward(
        config, ffn=required(config, "intermediate_size"), block="block_sparse_moe", parts=("w1", "w3", "w2")
    )
    return dense_weights(config, feed_forward=experts)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if not args.get("num_experts") or any(args.get(name) for name in ("qk_layernorm", "window_attn_skip_freq")):
        return None
    experts = expert_config(args, number="num_local_experts", width="intermediate_size")
    return default_config(args, "mixtral", "Mixtral") | sliding_window(args) | experts


MIXTRAL = Family(
    "Mixtral",
    ("mixtral",),
    _transformer_kwargs,
    _weights,
    _config,
    defaults={"rope_theta": 1000000.0, "rms_norm_eps": 1e-5},
)
