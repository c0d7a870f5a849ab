"""Mixtral 8x7B and 8x22B: Mistral's attention, experts in every layer."""

from __future__ import annotations

from typing import Any

from simpo_megatron.models.families.dense import dense_weights
from simpo_megatron.models.families.mistral import window_size
from simpo_megatron.models.families.moe import moe_feed_forward, moe_kwargs
from simpo_megatron.models.family import Family, Weight, refuse, required


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "router_jitter_noise", 0.0, 0, None, mend="set it to 0: the two members of a pair need one router")
    kwargs = moe_kwargs(config, ffn=required(config, "intermediate_size"), norm_topk_prob=True)
    return {**kwargs, **window_size(config.get("sliding_window"))}


def _weights(config: dict[str, Any]) -> tuple[Weight, ...]:
    experts = moe_feed_forward(
        config, ffn=required(config, "intermediate_size"), block="block_sparse_moe", parts=("w1", "w3", "w2")
    )
    return dense_weights(config, feed_forward=experts)


MIXTRAL = Family("Mixtral", ("mixtral",), _transformer_kwargs, _weights)
