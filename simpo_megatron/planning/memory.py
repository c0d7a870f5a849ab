"""Bytes that a rank of each pipeline stage needs: weights, gradients, optimizer state, activations, head.

    layout = layout_arguments(parallel, architecture.num_layers)
    print(estimate(architecture, layout, Workload(world_size=64, seq_length=4096, microbatches=8)).total)

Activations are the tensors that autograd keeps for the backward pass. They are counted one by one, for the layers of
Transformer Engine (`fused`) or for those on plain torch. For the latter the count is compared with what autograd really
keeps (`tests/planning/test_memory.py`). Experts are counted as if the router spread the tokens evenly. Communication
buffers, the CUDA context and fragmentation are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpo_megatron.adapters.lora import Lora, adapted_table
from simpo_megatron.config.memory import MemoryConfig
from simpo_megatron.models.additions import SCORES_BLOCK
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.parallel.stages import VOCAB_DIVISOR, padded_vocab_size
from simpo_megatron.planning.activations import layer_bytes, recomputed_modules
from simpo_megatron.planning.adapters import adapter_bytes
from simpo_megatron.planning.parameters import Parameters, layers_of_stages, stage_parameters
from simpo_megatron.planning.state import StateBytes

DEFAULT = MemoryConfig()


@dataclass(frozen=True)
class Workload:
    """What a run computes with a layout.

    Attributes:
        world_size: processes.
        seq_length: tokens of a packed row, before context parallelism cuts it.
        microbatches: packed rows of a step on each data-parallel rank.
        slab_bytes: bytes of the logits that the fused head holds at a time.
        bf16: weights and activations take 2 bytes, else 4.
        distributed_optimizer: the optimizer state is divided over the data- and context-parallel ranks.
        reference: there is a frozen copy of the weights in the same layout, which DPO needs.
        fused: the layers are Transformer Engine's, else those on plain torch.
        divisible_by: `--make-vocab-size-divisible-by`.
        memory: dtypes and places of gradients and optimizer state. FP8 is not counted.
        lora: of the adapters, where the weights are frozen.
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
    memory: MemoryConfig = DEFAULT
    lora: Lora | None = None

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: of the model.
        gradients: over all microbatches.
        optimizer: weights and Adam's two moments.
        activations: kept for the backward pass, and what a backward pass needs for the moment.
        head: logits, hidden states and gradients of the head.
        reference: weights of the reference model.
        update: what the optimizer step needs beyond the memory that activations and head leave to it.
        host: host memory of the optimizer: its state, or its copies while it is built. It is no part of the total.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    reference: int
    update: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All of them on the GPU."""
        return sum(vars(self).values()) - self.host


def saved_bytes(
    architecture: Architecture, layout: Mapping[str, Any], layers: Sequence[int], tokens: int, work: Workload
) -> float:
    """Bytes that autograd keeps of a model chunk for one microbatch.

    Args:
        architecture: the model.
        layout: from `limits.layout_arguments`.
        layers: of the model chunk, by their global indices.
        tokens: of this context-parallel rank.
        work: what is computed.
    """
    whole = _bytes_of_layers(architecture, layout, tokens, work, recomputed_modules(layout))
    if layout["recompute_granularity"] != "full":
        return sum(whole[layer] for layer in layers)
    model = architecture.transformer
    inputs = _shared(layout, tokens * model["hidden_size"] * work.element)
    block, angles = layout["recompute_num_layers"], tokens * model["kv_channels"] * 4  # fp32, shared by all layers
    if layout["recompute_method"] == "uniform":
        return len(layers) // block * inputs + angles
    return min(block, len(layers)) * inputs + sum(whole[layer] for layer in layers[block:]) + angles


def _bytes_of_layers(
    architecture: Architecture,
    layout: Mapping[str, Any],
    tokens: int,
    work: Workload,
    recomputed: frozenset[str] = frozenset(),
) -> list[float]:
    """Bytes that autograd keeps of every layer of the model, without what is `recomputed`."""
    of_kind = {}
    for experts in set(architecture.expert_layers):
        of_kind[experts] = tokens * layer_bytes(
            architecture,
            layout,
            experts=experts,
            element=work.element,
            fused=work.fused,
            recomputed=recomputed,
            lora=work.lora,
        )
        if work.lora is not None:
            of_kind[experts] += adapter_bytes(
                architecture,
                layout,
                work.lora,
                layer=list(architecture.expert_layers).index(experts),
                tokens=tokens,
                element=work.element,
                recomputed=recomputed,
            )
    return [of_kind[experts] for experts in architecture.expert_layers]


def _shared(layout: Mapping[str, Any], size: float) -> float:
    """A rank's share of bytes that sequence parallelism divides."""
    return size / (layout["tensor_model_parallel_size"] if layout["sequence_parallel"] else 1)


def in_flight(stage: int, layout: Mapping[str, Any], microbatches: int) -> int:
    """Forward passes of a model chunk that wait for their backward pass, at most.

    The same as Megatron's `schedules.get_pp_rank_microbatches`.

    Args:
        stage: the pipeline stage.
        layout: from `limits.layout_arguments`.
        microbatches: of a step on each data-parallel rank.
    """
    stages, virtual = layout["pipeline_model_parallel_size"], layout["virtual_pipeline_model_parallel_size"] or 1
    behind = stages - 1 - stage
    return min(virtual * microbatches, behind + 1 if virtual == 1 else 2 * behind + (virtual - 1) * stages + 1)


def estimate(architecture: Architecture, layout: Mapping[str, Any], work: Workload) -> Memory:
    """Bytes of a rank of the pipeline stage that needs most.

    Args:
        architecture: the model.
        layout: from `limits.layout_arguments`; it has passed `limits.check_layout`.
        work: what is computed.
    """
    table = None if work.lora is None else adapted_table(architecture, work.lora)
    parameters = stage_parameters(architecture, layout, work.divisible_by, table)
    stages = (_stage_memory(architecture, layout, work, stage, held) for stage, held in enumerate(parameters))
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(
    architecture: Architecture,
    layout: Mapping[str, Any],
    work: Workload,
    stage: int,
    held: Parameters,
) -> Memory:
    hidden_size, element = architecture.transformer["hidden_size"], work.element
    tensor, stages = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    tokens = work.seq_length // layout["context_parallel_size"]
    chunks = layers_of_stages(architecture.num_layers, layout)[stage]
    hidden = tokens * hidden_size * element

    saved = max(saved_bytes(architecture, layout, layers, tokens, work) for layers in chunks)
    if stages > 1:
        saved += _shared(layout, hidden)  # the output, which goes to the next stage
    activations = in_flight(stage, layout, work.microbatches) * saved + _working_set(architecture, layout, tokens, work)
    # The gradient of the largest weight takes memory of its own until it is added to the fp32 gradient. For the output
    # layer it is a placeholder of the same size, because the head adds to the fp32 gradient itself.
    rows = padded_vocab_size(architecture.vocab_size, tensor, work.divisible_by) // tensor
    vocabulary = 0 if work.lora else rows * hidden_size * element  # adapters leave it frozen
    if stage == 0:
        activations += vocabulary
    head = 0.0
    if stage == stages - 1:
        # Gathered, chosen and scattered hidden states and their fp32 gradient, as if every token were scored.
        head = work.slab_bytes + 3 * hidden + hidden // element * 4 + _shared(layout, 2 * hidden) + vocabulary

    state = StateBytes.of(work.memory, bf16=work.bf16)
    if stage == stages - 1 and state.gradient != 4:
        # The head adds in fp32, so each microbatch needs the output layer's gradient in fp32, twice for a moment.
        head += 8 * rows * hidden_size
    updated = _updated(layout, work, held)
    step = max(state.update * updated, state.device_copy * (held.trained + updated) - state.device * updated)
    return Memory(
        weights=element * held.total,
        gradients=state.gradient * held.trained,
        optimizer=math.ceil(state.device * updated),
        activations=math.ceil(activations),
        head=math.ceil(head),
        reference=element * held.total if work.reference else 0,
        update=max(0, math.ceil(step - activations - head)),
        host=math.ceil(max(state.host * updated, state.host_copy * (held.trained + updated))),
    )


def _updated(layout: Mapping[str, Any], work: Workload, held: Parameters) -> int:
    """The parameters that a rank updates: its share of those that it holds and trains."""
    if not work.distributed_optimizer:
        return held.trained
    tensor, stages = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    expert_ranks = (layout["expert_tensor_parallel_size"] or tensor) * layout["expert_model_parallel_size"] * stages
    copies, expert_copies = work.world_size // (tensor * stages), work.world_size // expert_ranks
    return math.ceil(held.trained_dense / copies) + math.ceil(held.trained_experts / expert_copies)


def _working_set(architecture: Architecture, layout: Mapping[str, Any], tokens: int, work: Workload) -> float:
    """Bytes that exist only during the backward pass of a layer: recomputed activations, and their gradients."""
    whole, recomputed = _bytes_of_layers(architecture, layout, tokens, work), 0.0
    if layout["recompute_granularity"] == "full":
        recomputed = max(whole) * (layout["recompute_num_layers"] if layout["recompute_method"] == "uniform" else 1)
    elif modules := recomputed_modules(layout):
        kept = _bytes_of_layers(architecture, layout, tokens, work, modules)
        recomputed = max(all_of_it - part for all_of_it, part in zip(whole, kept, strict=True))
    model, tensor = architecture.transformer, layout["tensor_model_parallel_size"]
    widest = 0.0
    if not all(architecture.expert_layers):
        widest = 2 * model["hidden_size"] + 3 * model["ffn_hidden_size"] / tensor
    if architecture.num_experts is not None:
        ranks = layout["expert_tensor_parallel_size"] or tensor
        copies = _shared(layout, model["moe_router_topk"] * ranks)
        widest = max(widest, copies * (2 * model["hidden_size"] + 3 * model["moe_ffn_hidden_size"] / ranks))
    scores = 0.0
    if architecture.scored_in_blocks and not work.fused:  # those of a block of queries and their gradients, in fp32
        scores = 4 * 4 * model["num_attention_heads"] / tensor * min(SCORES_BLOCK, tokens) * work.seq_length
    return recomputed + max(tokens * widest * work.element, scores)
