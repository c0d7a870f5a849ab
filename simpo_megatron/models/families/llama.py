"""Llama 2, 3, 3.1, 3.2, and other models with the same architecture, with and without biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family
from simpo_megatron.models.families.biases import bias_additions, bias_config, bias_kwargs, biased_weights
from simpo_megatron.models.families.dense import dense_kwargs
from simpo_megatron.models.megatron_args import default_config


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    return {**dense_kwargs(config), **bias_kwargs(config)}


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    biases = bias_config(args)
    if biases is None or any(args.get(name) for name in ("num_experts", "qk_layernorm", "window_size")):
        return None
    return default_config({**args, "add_bias_linear": False}, "llama", "Llama") | biases


LLAMA = Family("Llama", ("llama",), _transformer_kwargs, biased_weights, _config, additions=bias_additions)
