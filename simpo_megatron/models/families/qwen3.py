"""Qwen3, dense: Llama with a norm on every query and key head."""

from __future__ import annotations

from functools import partial
from typing import Any

from simpo_megatron.models.families.dense import dense_kwargs, dense_weights
from simpo_megatron.models.family import Family, refuse


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "use_sliding_window", False, None, mend="set it to false, which is exact up to the window's length")
    refuse(config, "attention_bias", False, None, mend="only Qwen3 models without biases run")
    # Qwen3's heads are 128 wide by default, whatever the hidden size is.
    return {**dense_kwargs({"head_dim": 128, **config}), "qk_layernorm": True}


def _weights(config: dict[str, Any]) -> Any:
    return partial(dense_weights, qk_norm=True)({"head_dim": 128, **config})


QWEN3 = Family("Qwen3", ("qwen3",), _transformer_kwargs, _weights)
