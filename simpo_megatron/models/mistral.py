"""Mistral 7B, Nemo and the other dense Mistral models: Llama with an optional sliding window."""

from __future__ import annotations

from typing import Any

from simpo_megatron.models.dense import dense_kwargs, dense_weights
from simpo_megatron.models.family import Family


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    kwargs = dense_kwargs(config)
    if window := config.get("sliding_window", 4096):  # null is no window; absent is Hugging Face's default
        kwargs["window_size"] = (window - 1, 0)  # Hugging Face counts the token itself, Megatron what is left of it
    return kwargs


MISTRAL = Family("Mistral", ("mistral",), _transformer_kwargs, dense_weights)
