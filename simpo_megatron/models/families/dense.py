"""What the dense families share: RMSNorm, grouped-query attention with rotary embeddings, and a SwiGLU feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import refuse, required
from simpo_megatron.models.part_layout import QKV, Copy, GateUp
from simpo_megatron.models.weight_table import EMBEDDING, OUTPUT, WeightEntry

BLOCK, LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."


def head_dim(config: dict[str, Any]) -> int:
    """The width of one attention head."""
    if config.get("head_dim") is not None:
        return required(config, "head_dim")
    return required(config, "hidden_size") // required(config, "num_attention_heads")


def query_groups(config: dict[str, Any]) -> int:
    """The number of key and value heads."""
    key = "num_attention_heads" if config.get("num_key_value_heads") is None else "num_key_value_heads"
    return required(config, key)


def dense_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of TransformerConfig that every dense family has.

    Raises:
        UserError: an activation, dropout or attention is not supported, or config.json lacks a value.
    """
    refuse(config, "hidden_act", "silu", fix="only SwiGLU models (silu) run")
    refuse(config, "attention_dropout", 0.0, None, fix="set it to 0: preference optimisation runs without dropout")
    if other := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(
            f"config.json lists {', '.join(sorted(other))} in layer_types; only full attention in every layer runs"
        )
    return {
        "num_layers": required(config, "num_hidden_layers"),
        "hidden_size": required(config, "hidden_size"),
        "ffn_hidden_size": required(config, "intermediate_size"),
        "num_attention_heads": required(config, "num_attention_heads"),
        "num_query_groups": query_groups(config),
        "kv_channels": head_dim(config),
        "layernorm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
    }


def dense_weights(
    config: dict[str, Any],
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    feed_forward: tuple[WeightEntry, ...] | None = None,
) -> tuple[WeightEntry, ...]:
    """The weight table of a dense model, without an output layer where it is tied to the embedding.

    Args:
        config: config.json.
        qkv_bias: whether the query, key and value projections have biases.
        output_bias: whether the output projection of the attention has a bias.
        mlp_bias: whether the projections of the SwiGLU have biases.
        qk_norm: whether queries and keys are normalised head by head.
        feed_forward: entries that replace those of the SwiGLU; None for the SwiGLU.
    """
    hidden, vocab = required(config, "hidden_size"), required(config, "vocab_size")
    head = head_dim(config)
    q, kv = required(config, "num_attention_heads") * head, query_groups(config) * head
    qkv = tuple(f"{LAYER}self_attn.{part}_proj." for part in "qkv")

    def norm(megatron: str, hf: str, size: int) -> WeightEntry:
        return WeightEntry(megatron, (hf,), ((size,),), Copy(), None)

    table = [
        WeightEntry(EMBEDDING, ("model.embed_tokens.weight",), ((vocab, hidden),), Copy(), 0),
        norm(f"{BLOCK}self_attention.linear_qkv.layer_norm_weight", f"{LAYER}input_layernorm.weight", hidden),
        WeightEntry(
            f"{BLOCK}self_attention.linear_qkv.weight",
            tuple(f"{part}weight" for part in qkv),
            ((q, hidden), (kv, hidden), (kv, hidden)),
            QKV(query_groups(config)),
            0,
        ),
    ]
    if qkv_bias:
        biases = tuple(f"{part}bias" for part in qkv)
        table.append(
            WeightEntry(
                f"{BLOCK}self_attention.linear_qkv.bias", biases, ((q,), (kv,), (kv,)), QKV(query_groups(config)), 0
            )
        )
    if qk_norm:
        table.append(norm(f"{BLOCK}self_attention.q_layernorm.weight", f"{LAYER}self_attn.q_norm.weight", head))
        table.append(norm(f"{BLOCK}self_attention.k_layernorm.weight", f"{LAYER}self_attn.k_norm.weight", head))
    table.append(
        WeightEntry(
            f"{BLOCK}self_attention.linear_proj.weight", (f"{LAYER}self_attn.o_proj.weight",), ((hidden, q),), Copy(), 1
        )
    )
    if output_bias:  # added after the sum over the tensor-parallel ranks, so that every rank holds all of it
        bias = f"{LAYER}self_attn.o_proj.bias"
        table.append(WeightEntry(f"{BLOCK}self_attention.linear_proj.bias", (bias,), ((hidden,),), Copy(), None))
    table += [
        norm(f"{BLOCK}mlp.linear_fc1.layer_norm_weight", f"{LAYER}post_attention_layernorm.weight", hidden),
        *(swiglu(config, mlp_bias) if feed_forward is None else feed_forward),
        norm("decoder.final_layernorm.weight", "model.norm.weight", hidden),
    ]
    if not config.get("tie_word_embeddings", False):
        table.append(WeightEntry(OUTPUT, ("lm_head.weight",), ((vocab, hidden),), Copy(), 0))
    return tuple(table)


def fused(table: tuple[WeightEntry, ...], tensors: Mapping[str, str]) -> tuple[WeightEntry, ...]:
    """The table of a checkpoint that keeps all parts of a parameter in one tensor, one behind the other.

    Args:
        table: with a tensor for each part.
        tensors: the name of the tensor of a layer by that of the parameter, both without the layer.
    """
    names = {BLOCK + megatron: LAYER + hf for megatron, hf in tensors.items()}
    return tuple(
        replace(entry, hf=(names[entry.megatron],) * len(entry.hf)) if entry.megatron in names else entry
        for entry in table
    )


def swiglu(config: dict[str, Any], bias: bool = False) -> tuple[WeightEntry, ...]:
    """The entries of a dense feed-forward, with those of its biases where it has them."""
    hidden, ffn = required(config, "hidden_size"), required(config, "intermediate_size")
    gate, up, down = (f"{LAYER}mlp.{part}_proj." for part in ("gate", "up", "down"))
    fc1, fc2 = f"{BLOCK}mlp.linear_fc1.", f"{BLOCK}mlp.linear_fc2."
    weights = (
        WeightEntry(f"{fc1}weight", (f"{gate}weight", f"{up}weight"), ((ffn, hidden), (ffn, hidden)), GateUp(), 0),
        WeightEntry(f"{fc2}weight", (f"{down}weight",), ((hidden, ffn),), Copy(), 1),
    )
    biases = (
        WeightEntry(f"{fc1}bias", (f"{gate}bias", f"{up}bias"), ((ffn,), (ffn,)), GateUp(), 0),
        WeightEntry(f"{fc2}bias", (f"{down}bias",), ((hidden,),), Copy(), None),
    )
    return weights + biases if bias else weights


def with_post_norms(
    table: tuple[WeightEntry, ...], config: dict[str, Any], *, attention: str, feed_forward: str
) -> tuple[WeightEntry, ...]:
    """A weight table with the norms behind attention and feed-forward.

    Args:
        table: of the model without them.
        config: config.json.
        attention: the checkpoint's name of the module behind the attention.
        feed_forward: the same behind the feed-forward.
    """
    shape = (required(config, "hidden_size"),)
    norms = (
        WeightEntry(f"{BLOCK}{module}.post_layernorm.weight", (f"{LAYER}{name}.weight",), (shape,), Copy(), None)
        for module, name in (("self_attention.linear_proj", attention), ("mlp.linear_fc2", feed_forward))
    )
    embedding, *others = table
    return (embedding, *norms, *others)
