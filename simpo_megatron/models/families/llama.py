"""Llama 2, 3, 3.1, 3.2 and what keeps their architecture."""

from __future__ import annotations

from typing import Any

from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.family import Family, refuse


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    # Megatron has one switch for the biases of o_proj and the feed-forward: a model with some of them cannot be built.
    for key in ("attention_bias", "mlp_bias"):
        refuse(config, key, False, None, mend="only Llama models without biases run")
    return dense_kwargs(config)


LLAMA = Family("Llama", ("llama",), _transformer_kwargs, dense_weights)
