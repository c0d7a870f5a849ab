"""What the families with multi-latent attention share: DeepSeek-V2 and DeepSeek-V3.

transformers rotates the dimensions of a head in interleaved pairs and leaves them in another order than Megatron. The
order is the same for queries and keys, so that the scores are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import refuse, required
from simpo_megatron.models.families.dense import BLOCK, LAYER, dense_weights
from simpo_megatron.models.megatron_args import need
from simpo_megatron.models.part_layout import Copy
from simpo_megatron.models.rope import read_rope
from simpo_megatron.models.weight_table import WeightEntry


def like_dense(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json with what a dense family reads of it: as many key heads as query heads, as wide as the values."""
    heads = required(config, "num_attention_heads")
    refuse(config, "num_key_value_heads", heads, None, fix="with latents there is a key head for every query head")
    return {**config, "num_key_value_heads": heads, "head_dim": required(config, "v_head_dim")}


def latent_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Megatron's MLATransformerConfig for the attention.

    Raises:
        UserError: config.json lacks a value, or asks for what Megatron's attention does not compute.
    """
    refuse(config, "attention_bias", False, None, fix="only models without biases run")
    rotated = required(config, "qk_rope_head_dim")
    refuse(config, "head_dim", rotated, None, fix="it is qk_rope_head_dim, the width that is rotated; remove it")
    # transformers normalises the latents with 1e-6, whatever the config says; Megatron has one value for all norms.
    refuse(config, "rms_norm_eps", 1e-6, fix="the norms of the latents have 1e-6, and Megatron has one for all norms")
    rope = read_rope(config)
    if rope.kind not in ("default", "yarn"):
        raise UserError(f"config.json asks for rope scaling {rope.kind!r}; models with latents run with 'yarn' or none")
    yarn = rope.kind == "yarn"
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": None if config.get("q_lora_rank") is None else required(config, "q_lora_rank"),
        "kv_lora_rank": required(config, "kv_lora_rank"),
        "qk_head_dim": required(config, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": rotated,
        "v_head_dim": required(config, "v_head_dim"),
        "kv_channels": required(config, "qk_nope_head_dim") + rotated,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_scaling_factor": rope.factor if yarn else 1.0,  # it scales the scores too
        "mscale": rope.mscale or 1.0,
        "mscale_all_dim": (rope.mscale_all_dim or 0.0) if yarn else 0.0,
    }


def latent_weights(config: dict[str, Any], feed_forward: tuple[WeightEntry, ...]) -> tuple[WeightEntry, ...]:
    """The weight table.

    Args:
        config: config.json.
        feed_forward: its entries.
    """
    heads, hidden = required(config, "num_attention_heads"), required(config, "hidden_size")
    nope, rotated = required(config, "qk_nope_head_dim"), required(config, "qk_rope_head_dim")
    latent, values = required(config, "kv_lora_rank"), required(config, "v_head_dim")

    def entry(megatron: str, hf: str, *shape: int, tp_dim: int | None = None) -> WeightEntry:
        return WeightEntry(f"{BLOCK}self_attention.{megatron}", (f"{LAYER}self_attn.{hf}",), (shape,), Copy(), tp_dim)

    attention = [
        entry("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight", latent + rotated, hidden),
        entry("linear_kv_up_proj.layer_norm_weight", "kv_a_layernorm.weight", latent),
        entry("linear_kv_up_proj.weight", "kv_b_proj.weight", heads * (nope + values), latent, tp_dim=0),
    ]
    queries = heads * (nope + rotated)
    if config.get("q_lora_rank") is None:
        attention.insert(0, entry("linear_q_proj.weight", "q_proj.weight", queries, hidden, tp_dim=0))
    else:
        rank = required(config, "q_lora_rank")
        attention[:0] = [
            entry("linear_q_down_proj.weight", "q_a_proj.weight", rank, hidden),
            entry("linear_q_up_proj.layer_norm_weight", "q_a_layernorm.weight", rank),
            entry("linear_q_up_proj.weight", "q_b_proj.weight", queries, rank, tp_dim=0),
        ]
    table = dense_weights(like_dense(config), feed_forward=feed_forward)
    at = next(index for index, one in enumerate(table) if one.megatron.endswith("linear_qkv.weight"))
    return (*table[:at], *attention, *table[at + 1 :])


def latent_config(args: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json of a model with latents contains of its attention.

    Raises:
        UserError: an argument is missing.
    """
    return {
        "num_key_value_heads": need(args, "num_attention_heads"),
        "q_lora_rank": args.get("q_lora_rank"),
        "kv_lora_rank": need(args, "kv_lora_rank"),
        "qk_nope_head_dim": need(args, "qk_head_dim"),
        "qk_rope_head_dim": need(args, "qk_pos_emb_head_dim"),
        "head_dim": need(args, "qk_pos_emb_head_dim"),
        "v_head_dim": need(args, "v_head_dim"),
    }
