"""Phi-3, Phi-3.5 and Phi-4: Mistral with q, k and v in one tensor, and gate and up in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.architecture import Family, refuse
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights, fused
from simpo_megatron.models.families.mistral import window_size
from simpo_megatron.models.megatron_args import default_config, sliding_window
from simpo_megatron.models.weight_table import WeightEntry

FUSED = {
    "self_attention.linear_qkv.weight": "self_attn.qkv_proj.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up_proj.weight",
}


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    for key in ("resid_pdrop", "embd_pdrop", "attention_dropout"):
        refuse(config, key, 0.0, None, fix="set it to 0: preference optimisation runs without dropout")
    return {**dense_kwargs({"rms_norm_eps": 1e-5, **config}), **window_size(config.get("sliding_window"))}


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    return fused(dense_weights(config), FUSED)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get("hf_model_type") != "phi3":
        return None  # the arguments are those of a Llama or Mistral, which compute the same
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return default_config(args, "phi3", "Phi3") | {"sliding_window": None} | sliding_window(args) | dropout


PHI3 = Family("Phi-3 and Phi-4", ("phi3",), _transformer_kwargs, _weights, _config)
