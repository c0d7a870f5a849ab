"""Mistral 7B, Nemo and the other dense Mistral models: Llama with an optional sliding window."""

from __future__ import annotations

from typing import Any

from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.family import Family


def window_size(sliding_window: int | None) -> dict[str, Any]:
    """The argument of TransformerConfig; Hugging Face counts the token itself, Megatron what is left of it."""
    return {"window_size": (sliding_window - 1, 0)} if sliding_window else {}


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    # null is no window; absent is Hugging Face's default
    return {**dense_kwargs(config), **window_size(config.get("sliding_window", 4096))}


MISTRAL = Family("Mistral", ("mistral",), _transformer_kwargs, dense_weights)
