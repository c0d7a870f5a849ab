"""`attention_bias` and `mlp_bias` of config.json: biases of all four attention projections, and of the feed-forward.

Megatron has one switch for all of them and one for query, key and value. What lies between is in `Additions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import refuse
from simpo_megatron.models.families.dense import dense_weights
from simpo_megatron.models.weight_table import WeightEntry

NAMES = ("attention_bias", "mlp_bias")


def _given(config: dict[str, Any]) -> tuple[bool, bool]:
    for name in NAMES:
        refuse(config, name, False, True, None, fix="it is true or false; copy it from the original model")
    return bool(config.get("attention_bias")), bool(config.get("mlp_bias"))


def bias_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of TransformerConfig.

    Raises:
        UserError: a value is neither true nor false.
    """
    attention, mlp = _given(config)
    return {"add_bias_linear": True} if attention and mlp else {"add_qkv_bias": True} if attention else {}


def attention_bias_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """`bias_kwargs` of a family whose feed-forward has no biases in transformers.

    Raises:
        UserError: as `bias_kwargs`, or config.json asks for biases of the feed-forward.
    """
    refuse(config, "mlp_bias", False, None, fix="transformers ignores it here; remove it")
    return bias_kwargs(config)


def bias_additions(config: dict[str, Any]) -> Additions:
    """The biases that TransformerConfig has no field for."""
    attention, mlp = _given(config)
    return Additions(attention_output_bias=attention and not mlp, mlp_bias=mlp and not attention)


def biased_weights(config: dict[str, Any], **kwargs: Any) -> tuple[WeightEntry, ...]:
    """`dense_weights` with the entries of the biases; `kwargs` are its other arguments."""
    attention, mlp = _given(config)
    return dense_weights(config, qkv_bias=attention, output_bias=attention, mlp_bias=mlp, **kwargs)


def bias_config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of the biases that Megatron-LM's arguments describe; None if it cannot say it."""
    both, output = bool(args.get("add_bias_linear")), bool(args.get("attention_output_bias"))
    if bool(args.get("add_qkv_bias")) != output and not both:
        return None
    found = (both or output, both or bool(args.get("mlp_bias")))
    return {name: True for name, value in zip(NAMES, found, strict=True) if value}
