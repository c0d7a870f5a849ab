"""Bytes that autograd keeps of one layer, counted tensor by tensor; `adapters.py` counts those of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.adapters.lora import Lora
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.rope import rotary_dim


def recomputed_modules(layout: Mapping[str, Any]) -> frozenset[str]:
    """The parts of a layer that selective recomputation computes again."""
    if layout["recompute_granularity"] != "selective":
        return frozenset()
    return frozenset(layout.get("recompute_modules") or ("core_attn",))


def layer_bytes(
    architecture: Architecture,
    layout: Mapping[str, Any],
    *,
    experts: bool,
    element: int,
    fused: bool,
    recomputed: frozenset[str] = frozenset(),
    lora: Lora | None = None,
) -> float:
    """Bytes that autograd keeps of one layer for one token of a context-parallel rank, without its adapters.

    Args:
        architecture: the model.
        layout: from `limits.layout_arguments`.
        experts: whether the layer has experts.
        element: bytes of an activation.
        fused: Transformer Engine's norms, attention and SwiGLU; else torch's, which keep more.
        recomputed: from `recomputed_modules`.
        lora: of the adapters, where the weights are frozen.
    """
    model, dense, additions = architecture.transformer, not experts, architecture.additions
    fused = fused and not additions.beyond_transformer_engine
    tensor = layout["tensor_model_parallel_size"]
    sequence = tensor if layout["sequence_parallel"] else 1
    post_norms = 2 * additions.post_norms
    # Of a norm behind attention or feed-forward its input is kept; torch also keeps the normalised input.
    own = 1 if fused or lora else 2
    before = _norms(dense, fused, recomputed, lora) if additions.pre_norms else 2  # what the projections read
    norms = before + post_norms * own
    kept = norms * model["hidden_size"] / sequence
    kept += _attention(architecture, tensor, sequence, fused, recomputed, lora)
    # fp32: of the norms, of the softmax
    statistics = 4 * (2 * additions.pre_norms + post_norms) / sequence + 4 * 2 * additions.qk_norm_over_heads
    if not _scored_again(architecture, fused, recomputed):
        statistics += 4 * model["num_attention_heads"] // tensor
    if dense:
        inner = (3 if fused and additions.activation == "silu" else 5) - (not keeps_input(lora, "down_proj"))
        kept += 0 if "mlp" in recomputed else inner * model["ffn_hidden_size"] / tensor
        return kept * element + statistics
    if "moe" in recomputed:
        return kept * element + statistics
    ranks, topk = layout["expert_tensor_parallel_size"] or tensor, model["moe_router_topk"]
    inner = (3 if fused else 6) - ("moe_act" in recomputed) - (not keeps_input(lora, "down_proj"))
    read = keeps_input(lora, "gate_proj", "up_proj") * model["hidden_size"]
    kept += expert_tokens(architecture, layout) * (read + inner * model["moe_ffn_hidden_size"] / ranks)
    # Indices, probabilities, and the map from tokens to experts.
    routing = (24 * topk + 5 * (architecture.num_experts or 0)) / sequence
    if "shared_experts" not in recomputed:
        kept += (3 if fused else 5) * model.get("moe_shared_expert_intermediate_size", 0) / tensor
    return kept * element + statistics + routing


def expert_tokens(architecture: Architecture, layout: Mapping[str, Any]) -> float:
    """Copies of a token that reach the experts of a rank."""
    tensor = layout["tensor_model_parallel_size"]
    ranks = layout["expert_tensor_parallel_size"] or tensor
    return architecture.transformer["moe_router_topk"] * ranks / (tensor if layout["sequence_parallel"] else 1)


def keeps_input(lora: Lora | None, *projections: str) -> bool:
    """Whether autograd keeps what these projections read.

    A trained weight needs it for its gradient. A frozen one does not, but A does, unless it reads what dropout leaves.
    """
    return lora is None or (not lora.dropout and not set(lora.targets).isdisjoint(projections))


def _attention(
    architecture: Architecture,
    tensor: int,
    sequence: int,
    fused: bool,
    recomputed: frozenset[str],
    lora: Lora | None,
) -> float:
    """Numbers that attention keeps for one token.

    Args:
        architecture: the model.
        tensor: tensor-parallel ranks.
        sequence: ranks that share the tokens outside attention.
        fused: Transformer Engine's layers.
        recomputed: from `recomputed_modules`.
        lora: see `layer_bytes`.
    """
    model, additions = architecture.transformer, architecture.additions
    width, heads = model["kv_channels"], model["num_attention_heads"] // tensor
    groups = model["num_query_groups"]
    q, k, v = heads * width, max(groups // tensor, 1) * width, heads * architecture.value_head_dim
    kept = 4.0 * rotary_dim(architecture.rope, architecture.rotary_head_dim)  # of queries and keys, cosine and sine
    kept += v * keeps_input(lora, "o_proj")  # attention's output, which the next projection reads
    if not fused and not _scored_again(architecture, fused, recomputed):
        kept += v  # torch attends one sequence at a time and keeps the pieces
    if model.get("multi_latent_attention"):
        latents = (model["q_lora_rank"] or 0) + model["kv_lora_rank"]
        kept += ((2 if fused else 3) * latents + model["qk_pos_emb_head_dim"]) / sequence
        return kept + (0 if "mla_up_proj" in recomputed else 2 * q + v)
    # With fewer query groups than ranks, every rank gathers the whole projection and keeps it.
    projection = q + 2 * k if groups >= tensor else (model["num_attention_heads"] + 2 * groups) * width
    kept += projection + (q + k)  # the projection, of which the values are a view, and the rotated queries and keys
    if model.get("qk_layernorm"):
        # torch's norm keeps the queries, which are a view of the projection where a rank has one group.
        kept += q + k if fused else (groups > tensor) * q + (q + k) * (lora is None)
    if additions.qk_norm_over_heads:
        kept += q + k
    return kept


def _scored_again(architecture: Architecture, fused: bool, recomputed: frozenset[str]) -> bool:
    """Whether the backward pass computes the scores again."""
    return (architecture.scored_in_blocks and not fused) or "core_attn" in recomputed


def _norms(dense: bool, fused: bool, recomputed: frozenset[str], lora: Lora | None) -> int:
    """Hidden states that the two norms of a layer keep: input and output; torch also keeps the normalised input.

    Transformer Engine computes a norm in the linear layer that follows, except before experts.
    """
    if not fused and "layernorm" in recomputed:
        return 2
    if not fused:
        # The router keeps what it reads, and recomputation starts from it.
        second = not dense or "mlp" in recomputed or keeps_input(lora, "gate_proj", "up_proj")
        return 2 + 2 * (lora is None) + keeps_input(lora, "q_proj", "k_proj", "v_proj") + second
    if dense:
        return 3 if "mlp" in recomputed else 4
    return 3 if "layernorm" in recomputed else 4
