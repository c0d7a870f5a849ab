"""Gemma-2: norms before and after attention and feed-forward, GeGLU, scaled embeddings, bounded scores and logits.

Attention scores and logits are bounded by `c * tanh(x / c)`. Every other layer, from the first on, has a sliding
window. Norms multiply by 1 + weight. `Gemma2ForCausalLM` of transformers is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import Architecture, Family, positive, refuse, required
from simpo_megatron.models.families.dense import dense_kwargs, dense_weights, with_post_norms
from simpo_megatron.models.families.windows import FULL, SLIDING, listed_layer_types, listed_windows, window_kwargs
from simpo_megatron.models.megatron_args import default_config, default_megatron_args
from simpo_megatron.models.weight_table import WeightEntry

# What transformers takes for keys that config.json of Gemma-2 or Gemma-3 may lack.
GEMMA_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def gemma_kwargs(config: dict[str, Any], full_every: int) -> dict[str, Any]:
    """The arguments of TransformerConfig of Gemma-2 and Gemma-3.

    Args:
        config: config.json, with the family's defaults.
        full_every: where config.json has no `layer_types`, every so many layers one has no window.

    Raises:
        UserError: as `dense_kwargs`, or a value would change the computation.
    """
    refuse(config, "hidden_activation", "gelu_pytorch_tanh", fix="only GeGLU models (gelu_pytorch_tanh) run")
    refuse(config, "attention_bias", False, None, fix="only Gemma models without biases run")
    refuse(config, "use_bidirectional_attention", False, None, fix="only causal models run")
    layers = range(required(config, "num_hidden_layers"))
    default = [SLIDING if (layer + 1) % full_every else FULL for layer in layers]
    return {
        **dense_kwargs({**config, "hidden_act": "silu", "layer_types": None}),  # both are read here
        "softmax_scale": required(config, "query_pre_attn_scalar") ** -0.5,
        "layernorm_zero_centered_gamma": True,
        **window_kwargs(config.get("sliding_window"), listed_layer_types(config, default)),
    }


def gemma_additions(config: dict[str, Any]) -> Additions:
    """What Gemma-2 and Gemma-3 compute beyond TransformerConfig."""
    return Additions(
        activation=config["hidden_activation"],
        post_norms=True,
        embedding_scale=required(config, "hidden_size") ** 0.5,
        attention_softcap=_bound(config, "attn_logit_softcapping"),
        logit_softcap=_bound(config, "final_logit_softcapping"),
    )


def _bound(config: dict[str, Any], key: str) -> float | None:
    return None if config.get(key) is None else positive(config, key)


def gemma_weights(config: dict[str, Any], *, qk_norm: bool = False) -> tuple[WeightEntry, ...]:
    """The weight table: `post_attention_layernorm` is the norm behind the attention, not that before the feed-forward.

    Args:
        config: config.json, with the family's defaults.
        qk_norm: whether queries and keys are normalised head by head.
    """
    table = tuple(
        replace(
            entry, hf=tuple(name.replace("post_attention_layernorm", "pre_feedforward_layernorm") for name in entry.hf)
        )
        for entry in dense_weights(config, qk_norm=qk_norm)
    )
    names = {"attention": "post_attention_layernorm", "feed_forward": "post_feedforward_layernorm"}
    return with_post_norms(table, config, **names)


def gemma_megatron_args(architecture: Architecture) -> dict[str, Any]:
    """Megatron-LM's arguments, which have another name for the norms' 1 + weight."""
    args = default_megatron_args(architecture)
    return args | {"apply_layernorm_1p": args.pop("layernorm_zero_centered_gamma")}


def gemma_config(args: Mapping[str, Any], model_type: str, prefix: str) -> dict[str, Any] | None:
    """The config.json of Gemma-2 or Gemma-3 from Megatron-LM's arguments; None where they describe another family.

    Args:
        args: by name.
        model_type: of config.json.
        prefix: of the family's classes in transformers.
    """
    if not (args.get("post_norms") and args.get("apply_layernorm_1p") and args.get("softmax_scale")):
        return None
    config = default_config(args, model_type, prefix)
    del config["hidden_act"]
    return {
        **config,
        "layer_types": [FULL] * config["num_hidden_layers"],
        **listed_windows(args),
        "hidden_activation": args.get("activation"),
        "query_pre_attn_scalar": round(args["softmax_scale"] ** -2),
        "attn_logit_softcapping": args.get("attention_softcap"),
        "final_logit_softcapping": args.get("logit_softcap"),
    }


def _kwargs(config: dict[str, Any]) -> dict[str, Any]:
    return gemma_kwargs(config, full_every=2)


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    return None if args.get("qk_layernorm") else gemma_config(args, "gemma2", "Gemma2")


GEMMA2 = Family(
    "Gemma-2",
    ("gemma2",),
    _kwargs,
    gemma_weights,
    _config,
    gemma_megatron_args,
    additions=gemma_additions,
    defaults={
        **GEMMA_DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
    },
)
