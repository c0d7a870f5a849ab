"""GLM-4: rotary embeddings that turn neighbouring dimensions of half a head, and gate and up in one tensor.

glm    GLM-4-9B (2024): otherwise a Llama with biases on the query, key and value projections.
glm4   GLM-4-0414, 9B and 32B: also a norm on the output of attention and of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import Family
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights, fused, with_post_norms
from simpo_megatron.models.megatron_args import default_config
from simpo_megatron.models.rope import read_partial_rope
from simpo_megatron.models.weight_table import WeightEntry

# What transformers takes where config.json does not say it (`configuration_glm4.py`).
_DEFAULTS = {
    "head_dim": 128,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}


def _transformer_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    return {**dense_kwargs(config), "add_qkv_bias": bool(config["attention_bias"]), "rotary_interleaved": True}


def _glm_weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    table = dense_weights(config, qkv_bias=bool(config["attention_bias"]))
    return fused(table, {"mlp.linear_fc1.weight": "mlp.gate_up_proj.weight"})


def _glm4_weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    names = {"attention": "post_self_attn_layernorm", "feed_forward": "post_mlp_layernorm"}
    return with_post_norms(_glm_weights(config), config, **names)


def _post_norms(config: dict[str, Any]) -> Additions:
    del config
    return Additions(post_norms=True)


def _config(model_type: str, prefix: str) -> Callable[[Mapping[str, Any]], dict[str, Any] | None]:
    def config(args: Mapping[str, Any]) -> dict[str, Any] | None:
        if not args.get("rotary_interleaved") or bool(args.get("post_norms")) != (model_type == "glm4"):
            return None
        found = default_config({**args, "rotary_interleaved": False}, model_type, prefix)
        return {"partial_rotary_factor": 1.0} | found | {"attention_bias": bool(args.get("add_qkv_bias"))}

    return config


GLM = Family(
    "GLM-4-9B",
    ("glm",),
    _transformer_kwargs,
    _glm_weights,
    _config("glm", "Glm"),
    rope=read_partial_rope,
    defaults=_DEFAULTS,
)
GLM4 = Family(
    "GLM-4-0414",
    ("glm4",),
    _transformer_kwargs,
    _glm4_weights,
    _config("glm4", "Glm4"),
    additions=_post_norms,
    rope=read_partial_rope,
    defaults=_DEFAULTS,
)
