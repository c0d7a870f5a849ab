"""DeepSeek-V2 and DeepSeek-V2-Lite: multi-latent attention, shared experts, and a softmax router."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from simpo_megatron.models.architecture import Family, refuse
from simpo_megatron.models.families.latent import latent_config, latent_kwargs, latent_weights, like_dense
from simpo_megatron.models.families.routed import (
    routed_additions,
    routed_config,
    routed_feed_forward,
    routed_kwargs,
)
from simpo_megatron.models.megatron_args import default_config
from simpo_megatron.models.weight_table import WeightEntry


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "mlp_bias", False, None, fix="only models without biases run")
    refuse(config, "topk_method", "greedy", "group_limited_greedy", fix="only these methods of DeepSeek-V2 run")
    # transformers ignores it, and the code of the checkpoints does not.
    refuse(config, "norm_topk_prob", False, None, fix="only models with plain probabilities run")
    return {**routed_kwargs(like_dense(config), sigmoid=False), **latent_kwargs(config)}


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    return latent_weights(config, routed_feed_forward(config, sigmoid=False))


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if not args.get("multi_latent_attention") or args.get("moe_router_score_function") != "softmax":
        return None
    method = "group_limited_greedy" if args.get("moe_router_num_groups") else "greedy"
    config = default_config(args, "deepseek_v2", "DeepseekV2") | latent_config(args) | routed_config(args)
    return config | {"topk_method": method, "norm_topk_prob": False}


DEEPSEEK_V2 = Family(
    "DeepSeek-V2",
    ("deepseek_v2",),
    _transformer_kwargs,
    _weights,
    _config,
    additions=partial(routed_additions, sigmoid=False),
    defaults={"q_lora_rank": 1536, "topk_method": "greedy", "n_shared_experts": 2, "routed_scaling_factor": 1.0},
)
