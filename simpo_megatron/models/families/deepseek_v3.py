"""DeepSeek-V3 and DeepSeek-R1: multi-latent attention, shared experts, and a sigmoid router with a correction bias."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from simpo_megatron.models.architecture import Family, refuse
from simpo_megatron.models.families.latent import latent_config, latent_kwargs, latent_weights, like_dense
from simpo_megatron.models.families.routed import (
    predicted_layers,
    routed_additions,
    routed_config,
    routed_feed_forward,
    routed_kwargs,
)
from simpo_megatron.models.megatron_args import default_config
from simpo_megatron.models.weight_table import WeightEntry


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "topk_method", "noaux_tc", None, fix="only this method of DeepSeek-V3 runs")
    refuse(config, "rope_interleave", True, fix="only models that rotate interleaved pairs run")
    return {**routed_kwargs(like_dense(config), sigmoid=True), **latent_kwargs(config)}


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    return latent_weights(config, routed_feed_forward(config, sigmoid=True))


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if not args.get("multi_latent_attention") or args.get("moe_router_score_function") != "sigmoid":
        return None
    return default_config(args, "deepseek_v3", "DeepseekV3") | latent_config(args) | routed_config(args)


DEEPSEEK_V3 = Family(
    "DeepSeek-V3",
    ("deepseek_v3",),
    _transformer_kwargs,
    _weights,
    _config,
    additions=partial(routed_additions, sigmoid=True),
    unread=predicted_layers,
    defaults={
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
    },
)
