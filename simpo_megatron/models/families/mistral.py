"""Mistral 7B, Mistral Nemo and the other dense Mistral models: Llama with an optional sliding window; and Ministral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Family, required
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.families.windows import (
    FULL,
    SLIDING,
    listed_layer_types,
    listed_windows,
    window_kwargs,
    window_size,
)
from simpo_megatron.models.megatron_args import default_config, sliding_window


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    window = config["sliding_window"]  # null means no window
    listed = set(config.get("layer_types") or ())
    if listed - {SLIDING if window else FULL}:
        raise UserError(
            f"config.json lists {' and '.join(sorted(listed))} in layer_types, which transformers ignores for a "
            "'mistral' model: all of its layers have the window, or none; is it a 'ministral' model?"
        )
    return {**dense_kwargs({**config, "layer_types": None}), **window_size(window)}


def _ministral_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    window = config["sliding_window"]
    default = [FULL if window is None else SLIDING] * required(config, "num_hidden_layers")
    windows = window_kwargs(window, listed_layer_types(config, default))
    return {**dense_kwargs({**config, "layer_types": None}), **windows}


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    others = ("num_experts", "qk_layernorm", "add_qkv_bias", "window_attn_skip_freq")
    if not args.get("window_size") or any(args.get(name) for name in others):
        return None  # without a window the arguments are those of a Llama
    return default_config(args, "mistral", "Mistral") | sliding_window(args)


def _ministral_config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    others = ("num_experts", "qk_layernorm", "add_qkv_bias")
    if not args.get("window_attn_skip_freq") or any(args.get(name) for name in others):
        return None  # with a window in all layers the arguments are those of a Mistral
    return default_config(args, "ministral", "Ministral") | listed_windows(args)


_DEFAULTS = {"sliding_window": 4096}
MISTRAL = Family("Mistral", ("mistral",), _transformer_kwargs, dense_weights, _config, defaults=_DEFAULTS)
MINISTRAL = Family("Ministral", ("ministral",), _ministral_kwargs, dense_weights, _ministral_config, defaults=_DEFAULTS)
