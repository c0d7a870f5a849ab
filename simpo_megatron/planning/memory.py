"""Bytes a rank of each pipeline stage needs: weights, gradients, optimizer state, activations, head.

    layout = layout_arguments(parallel, architecture.num_layers)
    print(estimate(architecture, layout, Workload(world_size=64, seq_length=4096, microbatches=8)).total)

Parameters are counted from the weight table of the family and are exact. Activations are what autograd keeps for the backward
pass, tensor by tensor, for the layers of Transformer Engine (`fused`) and for those of plain torch; for the latter the count is
compared with the tensors that autograd keeps (`tests/plan/test_memory.py`). Experts are counted as if the router spread the
tokens evenly. Communication buffers, the CUDA context and fragmentation are not in it.

Elements: H hidden, F feed-forward, Q and K width of all queries and of all keys, t tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.weight_table import EMBEDDING, WeightEntry
from simpo_megatron.parallel.stages import VOCAB_DIVISOR, padded_vocab_size, stage_layers


@dataclass(frozen=True)
class Workload:
    """What a rank computes with its layout.

    Attributes:
        world_size: processes.
        seq_length: tokens of a row, before context parallelism cuts it.
        microbatches: rows of a step and data-parallel rank.
        slab_bytes: logits the fused head holds at a time.
        bf16: weights and activations in 2 bytes, else in 4; gradients are fp32 either way.
        distributed_optimizer: optimizer state is cut over the data- and context-parallel ranks.
        reference: a frozen copy of the weights in the same layout, as DPO needs it.
        fused: Transformer Engine's layers, else those of plain torch.
        divisible_by: `--make-vocab-size-divisible-by`.
    """

    world_size: int
    seq_length: int
    microbatches: int
    slab_bytes: int = 256 * 2**20
    bf16: bool = True
    distributed_optimizer: bool = True
    reference: bool = False
    fused: bool = True
    divisible_by: int = VOCAB_DIVISOR

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank; those of experts are replicated over other ranks than the rest."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    reference: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def layers_of_stages(num_layers: int, layout: Mapping[str, Any]) -> list[int]:
    """Layers of every pipeline stage, virtual stages of a rank together; `layout` has passed `check_layout`."""
    virtual = layout["virtual_pipeline_model_parallel_size"] or 1
    first, last = (layout[f"num_layers_in_{end}_pipeline_stage"] for end in ("first", "last"))
    stages = stage_layers(num_layers, layout["pipeline_model_parallel_size"], virtual, first, last)
    return [sum(map(len, stage)) for stage in stages]


def stage_parameters(
    architecture: Architecture, layout: Mapping[str, Any], divisible_by: int = VOCAB_DIVISOR
) -> list[Parameters]:
    """Parameters a rank of each pipeline stage holds: its layers, the embedding first, final norm and output last."""
    counts = layers_of_stages(architecture.num_layers, layout)
    found = []
    for stage, layers in enumerate(counts):
        first, last = stage == 0, stage == len(counts) - 1
        dense = experts = 0
        for weight in architecture.weights:
            size = _rank_share(weight, layout, divisible_by)
            if weight.experts:
                experts += layers * size * (weight.experts // layout["expert_model_parallel_size"])
            elif weight.per_layer:
                dense += layers * size
            elif weight.megatron == EMBEDDING:
                # Tied, the last stage has a copy, unless it is the first one too.
                dense += size if first or (last and architecture.tied) else 0
            else:
                dense += size if last else 0
        found.append(Parameters(dense, experts))
    return found


def _rank_share(weight: WeightEntry, layout: Mapping[str, Any], divisible_by: int) -> int:
    """Elements of one parameter of this entry on one rank."""
    tensor = layout["tensor_model_parallel_size"]
    ranks = (layout["expert_tensor_parallel_size"] or tensor) if weight.experts else tensor
    shapes = [list(shape) for shape in weight.shapes]
    if weight.is_vocabulary:
        shapes[0][0] = padded_vocab_size(shapes[0][0], tensor, divisible_by)
    return sum(map(math.prod, shapes)) // (1 if weight.tp_dim is None else ranks)


def layer_bytes(model: Mapping[str, Any], layout: Mapping[str, Any], *, element: int, fused: bool) -> float:
    """Bytes autograd keeps of one layer for one token of the context-parallel rank.

    Args:
        model: `Architecture.transformer`.
        layout: `limits.layout_arguments`; with `recompute_granularity` "selective" the attention is recomputed.
        element: bytes of an activation.
        fused: Transformer Engine's norms, attention and SwiGLU; else torch's, which keep more.
    """
    tensor = layout["tensor_model_parallel_size"]
    sequence = tensor if layout["sequence_parallel"] else 1
    width, heads = model["kv_channels"], model["num_attention_heads"] // tensor
    q, k = heads * width, model["num_query_groups"] * width // tensor
    recomputed = layout["recompute_granularity"] == "selective"
    kept = (
        (2 if fused else 3) * 2 * model["hidden_size"] / sequence
    )  # input and output of both norms; torch's also x / |x|
    kept += (q + 2 * k) + (q + k)  # the projection, of which the values are a view, and the rotated queries and keys
    kept += 4 * width  # cosine and sine of queries and of keys
    kept += q  # attention's output, which the projection behind it reads
    if not fused and not recomputed:
        kept += q  # torch attends one sequence at a time and keeps the pieces
    if model.get("qk_layernorm"):
        kept += q + k if fused else 2 * q + k
    statistics = 4 * 2 / sequence + (0 if recomputed else 4 * heads)  # fp32: of the norms, of the softmax
    if "num_moe_experts" not in model:
        kept += (3 if fused else 5) * model["ffn_hidden_size"] / tensor
        return kept * element + statistics
    ranks, topk = layout["expert_tensor_parallel_size"] or tensor, model["moe_router_topk"]
    routed = topk * ranks / sequence  # copies of a token that reach the experts of a rank
    kept += routed * (model["hidden_size"] + (3 if fused else 6) * model["moe_ffn_hidden_size"] / ranks)
    routing = (
        24 * topk + 5 * model["num_moe_experts"]
    ) / sequence  # indices, probabilities and the map of who goes where
    return kept * element + statistics + routing


def saved_bytes(model: Mapping[str, Any], layout: Mapping[str, Any], layers: int, tokens: int, work: Workload) -> float:
    """Bytes autograd keeps of a chunk of layers for one microbatch.

    Args:
        model, layout: as for `layer_bytes`.
        layers: of the chunk.
        tokens: of this context-parallel rank.
    """
    whole = tokens * layer_bytes(model, layout, element=work.element, fused=work.fused)
    if layout["recompute_granularity"] != "full":
        return layers * whole
    inputs = _shared(layout, tokens * model["hidden_size"] * work.element)
    block, angles = layout["recompute_num_layers"], tokens * model["kv_channels"] * 4  # fp32, shared by all layers
    if layout["recompute_method"] == "uniform":
        return layers // block * inputs + angles
    return min(block, layers) * inputs + max(0, layers - block) * whole + angles


def _shared(layout: Mapping[str, Any], size: float) -> float:
    """The share of a rank in what sequence parallelism cuts."""
    return size / (layout["tensor_model_parallel_size"] if layout["sequence_parallel"] else 1)


def in_flight(stage: int, layout: Mapping[str, Any], microbatches: int) -> int:
    """Forward passes of a chunk whose backward pass is still to come, at most (`schedules.get_pp_rank_microbatches`)."""
    stages, virtual = layout["pipeline_model_parallel_size"], layout["virtual_pipeline_model_parallel_size"] or 1
    behind = stages - 1 - stage
    return min(virtual * microbatches, behind + 1 if virtual == 1 else 2 * behind + (virtual - 1) * stages + 1)


def estimate(architecture: Architecture, layout: Mapping[str, Any], work: Workload) -> Memory:
    """Bytes of a rank of the pipeline stage that needs most.

    Args:
        architecture: the model.
        layout: `limits.layout_arguments` that has passed `limits.check_layout`.
        work: the rest.
    """
    parameters = stage_parameters(architecture, layout, work.divisible_by)
    stages = (_stage_memory(architecture, layout, work, stage, held) for stage, held in enumerate(parameters))
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(
    architecture: Architecture, layout: Mapping[str, Any], work: Workload, stage: int, held: Parameters
) -> Memory:
    model, element = architecture.transformer, work.element
    tensor, stages = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    tokens = work.seq_length // layout["context_parallel_size"]
    chunks = layout["virtual_pipeline_model_parallel_size"] or 1
    layers = layers_of_stages(architecture.num_layers, layout)[stage] // chunks
    hidden = tokens * model["hidden_size"] * element
    last = stage == stages - 1

    saved = saved_bytes(model, layout, layers, tokens, work)
    if stages > 1:
        saved += _shared(layout, hidden)  # what goes to the next stage
    activations = in_flight(stage, layout, work.microbatches) * saved + _working_set(model, layout, tokens, work)
    # The gradient of the largest weight, before it is added to the fp32 one: of the embedding, or of the output layer,
    # where it is a placeholder, for the head adds to the fp32 gradient itself.
    rows = padded_vocab_size(architecture.vocab_size, tensor, work.divisible_by) // tensor
    vocabulary = rows * model["hidden_size"] * element
    if stage == 0:
        activations += vocabulary
    head = 0.0
    if last:  # gathered, chosen and scattered hidden states, and their fp32 gradient, were every token scored
        head = work.slab_bytes + 3 * hidden + hidden // element * 4 + _shared(layout, 2 * hidden) + vocabulary

    state = 12 if work.bf16 else 8  # fp32 master weight and Adam's two moments
    expert_ranks = (layout["expert_tensor_parallel_size"] or tensor) * layout["expert_model_parallel_size"] * stages
    replicas = (work.world_size // (tensor * stages), work.world_size // expert_ranks)
    if not work.distributed_optimizer:
        replicas = (1, 1)
    return Memory(
        weights=element * held.total,
        gradients=4 * held.total,
        optimizer=math.ceil(state * held.dense / replicas[0]) + math.ceil(state * held.experts / replicas[1]),
        activations=math.ceil(activations),
        head=math.ceil(head),
        reference=element * held.total if work.reference else 0,
    )


def _working_set(model: Mapping[str, Any], layout: Mapping[str, Any], tokens: int, work: Workload) -> float:
    """Bytes that come and go in the backward pass of a layer: what is recomputed, and gradients of activations."""
    recomputed = 0.0
    if layout["recompute_granularity"] == "full":
        block = layout["recompute_num_layers"] if layout["recompute_method"] == "uniform" else 1
        recomputed = block * tokens * layer_bytes(model, layout, element=work.element, fused=work.fused)
    tensor = layout["tensor_model_parallel_size"]
    if "num_moe_experts" in model:
        ranks = layout["expert_tensor_parallel_size"] or tensor
        copies = _shared(layout, model["moe_router_topk"] * ranks)
        widest = copies * (2 * model["hidden_size"] + 3 * model["moe_ffn_hidden_size"] / ranks)
    else:
        widest = 2 * model["hidden_size"] + 3 * model["ffn_hidden_size"] / tensor
    return recomputed + tokens * widest * work.element
