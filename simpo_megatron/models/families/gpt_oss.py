"""gpt-oss: a sink for every query head, a window in every other layer, and experts with biases and a clamped SwiGLU.

A sink is a score that belongs to no key: it takes a share of the probabilities of every query. An expert computes
`(up + 1) * gate * sigmoid(1.702 * gate)`, with gate at most and up within `swiglu_limit`. The checkpoint has the
weights of all experts of a layer in one tensor, transposed, with gate and up in turn.

`GptOssForCausalLM` of transformers is the reference. The published weights are quantized (MXFP4): transformers saves
them again in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import DEQUANTIZE_MXFP4, Family, positive, refuse, required
from simpo_megatron.models.families.dense import BLOCK, LAYER, dense_weights
from simpo_megatron.models.families.moe import moe_kwargs
from simpo_megatron.models.families.windows import FULL, SLIDING, listed_layer_types, listed_windows, window_kwargs
from simpo_megatron.models.megatron_args import default_config, expert_config
from simpo_megatron.models.part_layout import Copy, GateUp, PartLayout
from simpo_megatron.models.rope import Rope, read_rope
from simpo_megatron.models.weight_table import WeightEntry

_ALPHA = 1.702  # of Megatron's `quick_gelu`
# What transformers takes where config.json has no rotary parameters.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "quantization_config", None, fix=DEQUANTIZE_MXFP4)
    refuse(config, "attention_bias", True, fix="only models with biases run")
    refuse(config, "swiglu_alpha", _ALPHA, fix="Megatron computes with 1.702")
    layers = range(required(config, "num_hidden_layers"))
    default = [FULL if layer % 2 else SLIDING for layer in layers]
    plain = {**config, "layer_types": None}  # they are read here
    return {
        **moe_kwargs(plain, ffn=required(config, "intermediate_size"), norm_topk_prob=True),
        **window_kwargs(config["sliding_window"], listed_layer_types(config, default)),
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "activation_func_clamp_value": positive(config, "swiglu_limit"),
        "glu_linear_offset": 1.0,
    }


def _additions(config: dict[str, Any]) -> Additions:
    del config
    return Additions(activation="quick_gelu")


def _weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    sinks = WeightEntry(
        f"{BLOCK}self_attention.core_attention.softmax_offset",
        (f"{LAYER}self_attn.sinks",),
        ((required(config, "num_attention_heads"),),),
        Copy(),
        0,
    )
    table = dense_weights(config, qkv_bias=True, output_bias=True, feed_forward=_experts(config))
    embedding, *others = table
    return (embedding, sinks, *others)


def _experts(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    """The entries of router and experts."""
    hidden, ffn = required(config, "hidden_size"), required(config, "intermediate_size")
    experts = required(config, "num_local_experts")
    router, local = f"{BLOCK}mlp.router.", f"{BLOCK}mlp.experts.local_experts.{{expert}}."

    def expert(name: str, hf: str, parts: tuple[tuple[int, ...], ...], layout: PartLayout, tp_dim: int | None) -> Any:
        names = (f"{LAYER}mlp.experts.{hf}[{{expert}}]",) * len(parts)
        return WeightEntry(f"{local}{name}", names, parts, layout, tp_dim, experts=experts, transposed=True)

    return (
        WeightEntry(f"{router}weight", (f"{LAYER}mlp.router.weight",), ((experts, hidden),), Copy(), None),
        WeightEntry(f"{router}bias", (f"{LAYER}mlp.router.bias",), ((experts,),), Copy(), None),
        expert("linear_fc1.weight", "gate_up_proj", ((ffn, hidden), (ffn, hidden)), GateUp(), 0),
        expert("linear_fc1.bias", "gate_up_proj_bias", ((ffn,), (ffn,)), GateUp(), 0),
        expert("linear_fc2.weight", "down_proj", ((hidden, ffn),), Copy(), 1),
        expert("linear_fc2.bias", "down_proj_bias", ((hidden,),), Copy(), None),
    )


def _rope(config: dict[str, Any]) -> Rope:
    absent = config.get("rope_parameters") is None and not config.get("rope_scaling")
    return read_rope({**config, "rope_parameters": _YARN} if absent else config)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get("softmax_type") != "learnable" or not args.get("num_experts"):
        return None
    config = default_config({**args, "add_bias_linear": False}, "gpt_oss", "GptOss")
    experts = expert_config(args, number="num_local_experts", width="intermediate_size")
    del experts["norm_topk_prob"]
    types = {"layer_types": [FULL] * config["num_hidden_layers"], **listed_windows(args)}
    own = {"attention_bias": True, "swiglu_alpha": _ALPHA, "swiglu_limit": args.get("activation_func_clamp_value")}
    return config | experts | types | own


GPT_OSS = Family(
    "gpt-oss",
    ("gpt_oss",),
    _transformer_kwargs,
    _weights,
    _config,
    additions=_additions,
    rope=_rope,
    defaults={
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "max_position_embeddings": 131072,
        "attention_bias": True,
        "swiglu_alpha": _ALPHA,
        "swiglu_limit": 7.0,
    },
)
