"""The parallel layouts of a model on a number of GPUs, with their memory and idle time, best first.

Only layouts that `parallel/limits.py` accepts are listed. These are tried:

* tensor parallelism within a node, always with sequence parallelism;
* context parallelism within a node;
* even pipeline stages, with 1, 2 or 4 virtual stages a rank; a smaller first and last stage where the layers do not
  divide;
* whole experts, or experts divided like the other tensors;
* all activations kept, those of the MLPs or of the experts recomputed, or all. Recomputing the attention alone is not
  tried: it saves next to nothing where a fused attention keeps only its output.

The best layout has the smallest `slowdown`, which is the time of a step divided by the time of an ideal one. In an
ideal step no pipeline stage waits, all data-parallel ranks have the same number of packed rows, and no activation is
recomputed. Communication is not estimated. Instead, of layouts within 5 % of each other, the one that divides tensors
and sequences over fewer ranks comes first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from simpo_megatron.adapters.lora import Lora
from simpo_megatron.config.memory import MemoryConfig
from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import check_layout, check_processes, check_rows, layout_arguments
from simpo_megatron.parallel.stages import divisors
from simpo_megatron.planning.activations import recomputed_modules
from simpo_megatron.planning.memory import DEFAULT, Memory, Workload, estimate

GPUS_PER_NODE = 8
MOST_GPUS = 1024
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Request:
    """The run that layouts are wanted for.

    Attributes:
        gpu_bytes: memory of a GPU that a run may fill.
        seq_length: tokens of a packed row.
        packed_rows: packed rows of a step, over all ranks.
        slab_bytes: bytes of the logits that the fused head holds at a time.
        reference: whether a frozen reference model stays on the GPUs.
        memory: dtypes and places of gradients and optimizer state.
        lora: of the adapters, where the weights are frozen.
    """

    gpu_bytes: int
    seq_length: int
    packed_rows: int
    slab_bytes: int
    reference: bool = False
    memory: MemoryConfig = DEFAULT
    lora: Lora | None = None


@dataclass(frozen=True)
class LayoutCost:
    """A layout and what it costs.

    Attributes:
        parallel: the layout.
        data_parallel_size: data-parallel ranks.
        microbatches: packed rows of a step on each data-parallel rank.
        bubble: share of a step in which a pipeline stage waits for the others.
        slowdown: time of a step divided by the time of an ideal one, see above.
        memory: of the rank that needs most.
    """

    parallel: ParallelConfig
    data_parallel_size: int
    microbatches: int
    bubble: float
    slowdown: float
    memory: Memory

    @property
    def order(self) -> tuple[Any, ...]:
        """The sort key, best first."""
        p = self.parallel
        cut = p.tensor_model_parallel_size * p.context_parallel_size
        experts = p.expert_model_parallel_size * (p.expert_tensor_parallel_size or 1)
        return round(self.slowdown * 20), cut, p.pipeline_model_parallel_size, experts, self.memory.total


def fitting(architecture: Architecture, gpus: int, request: Request) -> list[LayoutCost]:
    """The layouts of a model on this many GPUs that fit into their memory, best first."""
    costs = [cost(architecture, parallel, gpus, request) for parallel in legal(architecture, gpus, request.seq_length)]
    return sorted((one for one in costs if one.memory.total <= request.gpu_bytes), key=lambda one: one.order)


def fewest(architecture: Architecture, request: Request) -> tuple[int, LayoutCost] | None:
    """The smallest number of GPUs on which a layout fits (1, 2, 4 or whole nodes), and the best layout there."""
    for gpus in (1, 2, 4, *range(GPUS_PER_NODE, MOST_GPUS + 1, GPUS_PER_NODE)):
        if found := fitting(architecture, gpus, request):
            return gpus, found[0]
    return None


def cost(architecture: Architecture, parallel: ParallelConfig, gpus: int, request: Request) -> LayoutCost:
    """What a layout costs on this many GPUs."""
    layout = layout_arguments(parallel, architecture.num_layers)
    stages, virtual = parallel.pipeline_model_parallel_size, layout["virtual_pipeline_model_parallel_size"] or 1
    data = gpus // (parallel.tensor_model_parallel_size * parallel.context_parallel_size * stages)
    microbatches = max(1, math.ceil(request.packed_rows / data))
    if virtual > 1:  # the interleaved schedule needs a multiple of the stages; the missing rows are empty ones
        microbatches = math.ceil(microbatches / stages) * stages
    waiting = (stages - 1) / virtual
    recompute = 1 + _recomputed_share(architecture, layout) / 3  # a forward pass is a third of the arithmetic
    work = Workload(
        world_size=gpus,
        seq_length=request.seq_length,
        microbatches=microbatches,
        slab_bytes=request.slab_bytes,
        reference=request.reference,
        memory=request.memory,
        lora=request.lora,
    )
    return LayoutCost(
        parallel=parallel,
        data_parallel_size=data,
        microbatches=microbatches,
        bubble=waiting / (microbatches + waiting),
        slowdown=(microbatches + waiting) * recompute / (request.packed_rows / data),
        memory=estimate(architecture, layout, work),
    )


def _recomputed_share(architecture: Architecture, layout: dict[str, Any]) -> float:
    """The share of the products of matrices of a layer that the backward pass computes again."""
    if layout["recompute_granularity"] == "full":
        return 1.0
    modules = recomputed_modules(layout)
    if not modules & {"mlp", "moe"}:
        return 0.0
    total = again = 0
    for entry in architecture.weights:
        size = sum(math.prod(shape) for shape in entry.shapes if len(shape) > 1)
        size *= architecture.transformer["moe_router_topk"] if entry.experts else 1
        for layer, experts in enumerate(architecture.expert_layers):
            if entry.in_layer(layer):
                total += size
                again += size if ".mlp." in entry.megatron and ("moe" if experts else "mlp") in modules else 0
    return again / total


def legal(architecture: Architecture, gpus: int, seq_length: int) -> Iterator[ParallelConfig]:
    """The tried layouts of a model on this many GPUs that `parallel/limits.py` accepts."""
    model = architecture.transformer
    recomputed = recomputations(architecture.expert_layers)
    for base in _dense(architecture.num_layers, gpus, recomputed):
        for parallel in _with_experts(base, architecture.num_experts):
            try:
                layout = layout_arguments(parallel, architecture.num_layers)
                check_layout(model, layout)
                check_rows(seq_length, parallel)
                check_processes(gpus, architecture.num_experts is not None, layout)
            except UserError:
                continue
            yield parallel


def recomputations(expert_layers: Collection[bool]) -> tuple[dict[str, Any], ...]:
    """The tried settings of recomputation.

    Args:
        expert_layers: whether each layer has experts.
    """
    modules = tuple(name for name, kind in (("mlp", False), ("moe", True)) if kind in expert_layers)
    return ({}, {"recompute_granularity": "selective", "recompute_modules": modules}, FULL)


def _dense(num_layers: int, gpus: int, recomputed: tuple[dict[str, Any], ...]) -> Iterator[ParallelConfig]:
    """The tried sizes of tensor, pipeline and context parallelism, with each tried recomputation."""
    for tensor in divisors(math.gcd(gpus, GPUS_PER_NODE)):
        for stages in (n for n in divisors(gpus // tensor) if n <= num_layers):
            for context in divisors(math.gcd(gpus // (tensor * stages), GPUS_PER_NODE)):
                for pipeline in _pipelines(num_layers, stages):
                    for recompute in recomputed:
                        yield ParallelConfig(
                            tensor_model_parallel_size=tensor,
                            sequence_parallel=tensor > 1,
                            context_parallel_size=context,
                            **pipeline,
                            **recompute,
                        )


def _pipelines(num_layers: int, stages: int) -> Iterator[dict[str, Any]]:
    """The tried ways to divide the layers into stages."""
    sizes: dict[str, Any] = {"pipeline_model_parallel_size": stages}
    if num_layers % stages == 0:
        yield sizes
        layers = num_layers // stages
        for virtual in (2, 4):
            if stages > 1 and layers % virtual == 0:
                yield {**sizes, "num_layers_per_virtual_pipeline_stage": layers // virtual}
        return
    edges = num_layers - math.ceil(num_layers / stages) * (stages - 2)
    if edges >= 2:
        yield {
            **sizes,
            "decoder_first_pipeline_num_layers": edges - edges // 2,
            "decoder_last_pipeline_num_layers": edges // 2,
        }


def _with_experts(base: ParallelConfig, experts: int | None) -> Iterator[ParallelConfig]:
    """A layout with every tried way to divide the experts; unchanged for a dense model."""
    if experts is None:
        yield base
        return
    for size in divisors(experts):
        for tensor in sorted({1, base.tensor_model_parallel_size}):
            yield replace(base, expert_model_parallel_size=size, expert_tensor_parallel_size=tensor)
