"""Llama 2, 3, 3.1, 3.2, and other models with the same architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family, refuse
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.megatron_args import default_config


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    # Megatron has one switch for the biases of o_proj and of the feed-forward. It cannot build a model with only one.
    for key in ("attention_bias", "mlp_bias"):
        refuse(config, key, False, None, fix="only Llama models without biases run")
    return dense_kwargs(config)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if any(args.get(name) for name in ("num_experts", "qk_layernorm", "add_qkv_bias", "window_size")):
        return None
    return default_config(args, "llama", "Llama")


LLAMA = Family("Llama", ("llama",), _transformer_kwargs, dense_weights, _config)
