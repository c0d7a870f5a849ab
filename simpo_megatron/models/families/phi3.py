"""Phi-3, Phi-3.5 and Phi-4: Mistral with q, k and v in one tensor, and gate and up in one.

Phi-4-mini rotates three quarters of a head. The models with a long context have the rope scaling "longrope".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Family, refuse
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights, fused
from simpo_megatron.models.families.windows import window_size
from simpo_megatron.models.megatron_args import default_config, sliding_window
from simpo_megatron.models.rope import Rope, read_partial_rope
from simpo_megatron.models.weight_table import WeightEntry

FUSED = {
    "self_attention.linear_qkv.weight": "self_attn.qkv_proj.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up_proj.weight",
}
_CONTEXT = "original_max_position_embeddings"


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    for key in ("resid_pdrop", "embd_pdrop"):
        refuse(config, key, 0.0, None, fix="set it to 0: preference optimisation runs without dropout")
    return {**dense_kwargs(config), **window_size(config.get("sliding_window"))}


def _rope(config: dict[str, Any]) -> Rope:
    """The frequencies. "su" and "yarn" are old names of "longrope" in this family (`configuration_phi3.py`)."""
    config = {_CONTEXT: 4096, **config}
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name) or {}
        old = {key: "longrope" for key in ("type", "rope_type") if given.get(key) in ("su", "yarn")}
        config[name] = {**given, **old}
    rope = read_partial_rope(config)
    if rope.kind not in ("default", "longrope"):
        raise UserError(f"config.json asks for rope scaling {rope.kind!r}; a 'phi3' model has 'longrope' or none")
    return rope


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    return fused(dense_weights(config), FUSED)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get("hf_model_type") != "phi3":
        return None  # the arguments are those of a Llama or Mistral, which compute the same
    config: dict[str, Any] = default_config(args, "phi3", "Phi3") | {"sliding_window": None} | sliding_window(args)
    context = config.get("rope_scaling", {}).get(_CONTEXT)
    return config | ({} if context is None else {_CONTEXT: context})


PHI3 = Family(
    "Phi-3 and Phi-4",
    ("phi3",),
    _transformer_kwargs,
    _weights,
    _config,
    rope=_rope,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
