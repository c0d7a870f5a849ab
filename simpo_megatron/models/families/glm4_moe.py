"""GLM-4.5 and GLM-4.5-Air: heads that are rotated in part, shared experts, and a sigmoid router as DeepSeek-V3's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from simpo_megatron.models.architecture import Family, refuse
from simpo_megatron.models.families.dense import dense_weights
from simpo_megatron.models.families.routed import (
    predicted_layers,
    routed_additions,
    routed_config,
    routed_feed_forward,
    routed_kwargs,
)
from simpo_megatron.models.megatron_args import default_config
from simpo_megatron.models.rope import read_partial_rope
from simpo_megatron.models.weight_table import WeightEntry


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    for name in ("attention_bias", "use_qk_norm"):
        refuse(config, name, False, True, None, fix="it is true or false; copy it from the original model")
    return {
        **routed_kwargs(config, sigmoid=True),
        "add_qkv_bias": bool(config.get("attention_bias")),
        "qk_layernorm": bool(config.get("use_qk_norm")),
    }


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    return dense_weights(
        config,
        qkv_bias=bool(config.get("attention_bias")),
        qk_norm=bool(config.get("use_qk_norm")),
        feed_forward=routed_feed_forward(config, sigmoid=True),
    )


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get("multi_latent_attention") or args.get("moe_router_score_function") != "sigmoid":
        return None
    own = {"attention_bias": bool(args.get("add_qkv_bias")), "use_qk_norm": bool(args.get("qk_layernorm"))}
    own["partial_rotary_factor"] = args.get("rotary_percent", 1.0)
    return default_config(args, "glm4_moe", "Glm4Moe") | routed_config(args) | own


GLM4_MOE = Family(
    "GLM-4.5",
    ("glm4_moe",),
    _transformer_kwargs,
    _weights,
    _config,
    additions=partial(routed_additions, sigmoid=True),
    rope=read_partial_rope,
    unread=predicted_layers,
    defaults={
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
    },
)
