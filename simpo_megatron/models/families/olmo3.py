"""OLMo-3: OLMo-2 with a sliding window in three of four layers, which keep the rotary embedding of the short context.

`Olmo3ForCausalLM` of transformers is the reference. `rope_parameters` are given for each type of layer; `rope_scaling`,
as older config.json files have it, is of the layers without a window alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import Family, refuse, required
from simpo_megatron.models.families.biases import attention_bias_kwargs
from simpo_megatron.models.families.dense import dense_kwargs
from simpo_megatron.models.families.olmo2 import DEFAULTS, olmo_additions, olmo_config, olmo_weights
from simpo_megatron.models.families.windows import (
    FULL,
    SLIDING,
    listed_layer_types,
    listed_windows,
    scaling_of_full,
    unscaled_theta,
    window_kwargs,
)
from simpo_megatron.models.rope import Rope, read_rope

_THETA = 500000.0


def _layer_types(config: dict[str, Any]) -> list[str]:
    layers = range(required(config, "num_hidden_layers"))
    return list(listed_layer_types(config, [SLIDING if (layer + 1) % 4 else FULL for layer in layers]))


def _kwargs(config: dict[str, Any]) -> dict[str, Any]:
    of_all = dense_kwargs({**config, "layer_types": None})
    return {
        **of_all,
        **attention_bias_kwargs(config),
        **window_kwargs(config.get("sliding_window"), _layer_types(config)),
    }


def _rope(config: dict[str, Any], layer_type: str = FULL) -> Rope:
    """The rotary embedding of the layers of a type."""
    given = config.get("rope_parameters") or {}
    if given.keys() - {FULL, SLIDING}:
        raise UserError(
            f"config.json has rope_parameters for {', '.join(sorted(given))}; an OLMo-3 has them for {FULL} and "
            f"{SLIDING}"
        )
    if any("rope_theta" not in (given.get(kind) or {}) for kind in (FULL, SLIDING)):
        # transformers gives the first type that lacks a base this one, and the other its default.
        refuse(config, "rope_theta", _THETA, fix=f"give rope_parameters for {FULL} and for {SLIDING}")
    parameters = dict(given.get(layer_type) or {})
    if layer_type == FULL:
        parameters |= scaling_of_full(config)
    refuse(parameters, "truncate", True, None, fix="transformers ignores it here; remove it")
    context = {name: config.get(name) for name in ("model_type", "max_position_embeddings", "partial_rotary_factor")}
    return read_rope({**context, "rope_parameters": {"rope_theta": _THETA, **parameters}})


def _additions(config: dict[str, Any]) -> Additions:
    windowed = _rope(config, SLIDING)
    theta = unscaled_theta(windowed)
    other = SLIDING in _layer_types(config) and windowed != _rope(config)
    return replace(olmo_additions(config), window_rope_theta=theta if other else None)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    found = olmo_config(args, "olmo3", "Olmo3")
    if found is None or not args.get("window_size"):
        return None
    theta, scaling = found.pop("rope_theta"), found.pop("rope_scaling", {"rope_type": "default"})
    windowed = {"rope_type": "default", "rope_theta": args.get("window_rope_theta") or theta}
    ropes = {FULL: {"rope_theta": theta, **scaling}, SLIDING: windowed}
    return {**found, **listed_windows(args), "rope_parameters": ropes}


OLMO3 = Family(
    "OLMo-3",
    ("olmo3",),
    _kwargs,
    olmo_weights,
    _config,
    additions=_additions,
    rope=_rope,
    defaults={**DEFAULTS, "sliding_window": 4096},
)
