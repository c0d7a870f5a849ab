"""OLMo-2: norms behind attention and feed-forward instead of before, and norms over all heads of queries and of keys.

`Olmo2ForCausalLM` of transformers is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import Family, required
from simpo_megatron.models.families.biases import attention_bias_kwargs, bias_additions, bias_config, biased_weights
from simpo_megatron.models.families.dense import BLOCK, LAYER, dense_kwargs, head_dim, query_groups, with_post_norms
from simpo_megatron.models.megatron_args import default_config
from simpo_megatron.models.part_layout import Copy
from simpo_megatron.models.weight_table import WeightEntry

DEFAULTS = {"rms_norm_eps": 1e-5}


def _kwargs(config: dict[str, Any]) -> dict[str, Any]:
    return {**dense_kwargs(config), **attention_bias_kwargs(config)}


def olmo_additions(config: dict[str, Any]) -> Additions:
    """What OLMo-2 and OLMo-3 compute beyond TransformerConfig."""
    return replace(bias_additions(config), pre_norms=False, post_norms=True, qk_norm_over_heads=True)


def olmo_weights(config: dict[str, Any]) -> tuple[WeightEntry, ...]:
    """The weight table: that of a Llama, with other norms."""
    head = head_dim(config)
    pre_norms = (f"{BLOCK}self_attention.linear_qkv.layer_norm_weight", f"{BLOCK}mlp.linear_fc1.layer_norm_weight")
    without = tuple(entry for entry in biased_weights(config) if entry.megatron not in pre_norms)
    names = {"attention": "post_attention_layernorm", "feed_forward": "post_feedforward_layernorm"}
    embedding, *others = with_post_norms(without, config, **names)
    heads = (
        WeightEntry(
            f"{BLOCK}self_attention.{part}_layernorm.weight",
            (f"{LAYER}self_attn.{part}_norm.weight",),
            ((size,),),
            Copy(),
            0,
        )
        for part, size in (("q", required(config, "num_attention_heads") * head), ("k", query_groups(config) * head))
    )
    return (embedding, *heads, *others)


def olmo_config(args: Mapping[str, Any], model_type: str, prefix: str) -> dict[str, Any] | None:
    """The config.json of OLMo-2 or OLMo-3 from Megatron-LM's arguments; None where they describe another family.

    Args:
        args: by name.
        model_type: of config.json.
        prefix: of the family's classes in transformers.
    """
    biases = bias_config(args)
    if biases is None or not args.get("qk_norm_over_heads"):
        return None
    return default_config(args, model_type, prefix) | biases


def _config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    return None if args.get("window_size") else olmo_config(args, "olmo2", "Olmo2")


OLMO2 = Family("OLMo-2", ("olmo2",), _kwargs, olmo_weights, _config, additions=olmo_additions, defaults=DEFAULTS)
