"""Mistral 7B, Mistral Nemo and the other dense Mistral models: Llama with an optional sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.megatron_args import default_config, sliding_window


def window_size(sliding_window: int | None) -> dict[str, Any]:
    """The argument of TransformerConfig, empty without a window.

    Hugging Face counts the token itself, Megatron only the tokens on its left.
    """
    return {"window_size": (sliding_window - 1, 0)} if sliding_window else {}


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    # null means no window; where the key is absent, transformers takes 4096.
    return {**dense_kwargs(config), **window_size(config.get("sliding_window", 4096))}


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    others = ("num_experts", "qk_layernorm", "add_qkv_bias", "window_attn_skip_freq")
    if not args.get("window_size") or any(args.get(name) for name in others):
        return None  # without a window the arguments are those of a Llama
    return default_config(args, "mistral", "Mistral") | sliding_window(args)


MISTRAL = Family("Mistral", ("mistral",), _transformer_kwargs, dense_weights, _config)
