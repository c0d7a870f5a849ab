"""Gemma-3, its text model: Gemma-2 with norms of queries and keys and a second rotary embedding, and without bounds.

Of every six layers the first five have a sliding window, and rotary frequencies of their own. transformers ignores
`attn_logit_softcapping`. `Gemma3ForCausalLM` of transformers is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import Family, refuse, required
from simpo_megatron.models.families.gemma2 import (
    GEMMA_DEFAULTS,
    gemma_additions,
    gemma_config,
    gemma_kwargs,
    gemma_megatron_args,
    gemma_weights,
)
from simpo_megatron.models.families.windows import FULL, SLIDING, scaling_of_full, unscaled_theta
from simpo_megatron.models.rope import Rope, read_rope


def _kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "attn_logit_softcapping", None, fix="transformers ignores it for Gemma-3; remove it")
    return {**gemma_kwargs(config, full_every=required(config, "sliding_window_pattern")), "qk_layernorm": True}


def _ropes(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` by the type of the layer (transformers 5); empty where config.json has the older keys."""
    ropes = config.get("rope_parameters") or {}
    if other := sorted(set(ropes) - {FULL, SLIDING}):
        raise UserError(
            f"config.json has {', '.join(other)} in rope_parameters; a Gemma-3 has one rotary embedding for {FULL} and "
            f"one for {SLIDING}"
        )
    return ropes


def _rope(config: dict[str, Any]) -> Rope:
    """The rotary embedding of the layers without a window."""
    parameters = {**(_ropes(config).get(FULL) or {}), **scaling_of_full(config)}
    refuse(parameters, "truncate", True, None, fix="transformers ignores it here; remove it")
    return read_rope({**config, "rope_scaling": None, "rope_parameters": parameters})


def _additions(config: dict[str, Any]) -> Additions:
    of_windows = {"rope_theta": config["rope_local_base_freq"], "rope_parameters": _ropes(config).get(SLIDING)}
    theta = unscaled_theta(read_rope({"model_type": config.get("model_type"), **of_windows}))
    additions = gemma_additions(config)
    windowed = "window_size" in _kwargs(config)
    return replace(additions, window_rope_theta=theta if windowed else None)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    config = gemma_config(args, "gemma3_text", "Gemma3") if args.get("qk_layernorm") else None
    if config is not None and args.get("window_rope_theta"):
        config["rope_local_base_freq"] = args["window_rope_theta"]
    return config


GEMMA3 = Family(
    "Gemma-3 (text)",
    ("gemma3_text",),
    _kwargs,
    partial(gemma_weights, qk_norm=True),
    _config,
    gemma_megatron_args,
    additions=_additions,
    rope=_rope,
    defaults={
        **GEMMA_DEFAULTS,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 131_072,
    },
)
