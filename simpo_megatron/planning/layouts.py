"""The layouts of a model on a number of GPUs, with memory and idle time, best first.

Only layouts that `models/limits.py` accepts are listed. Tried are tensor parallelism within a node, always with sequence
parallelism; even pipeline stages, or a first and a last stage of their own where the layers do not divide; 1, 2 or 4 virtual
stages a rank; whole experts or experts cut as the other tensors are; activations kept, or recomputed whole (recomputing the
attention alone saves next to nothing where a fused attention keeps its output only).

Best is the smallest `slowdown`: the time of a step against that of a pipeline that is never idle, of data-parallel ranks that
all have the same number of rows, and of activations that are kept. Communication has no number here: of layouts within 5 % of
each other the one that cuts tensors and sequences over fewer ranks comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import check_layout, check_processes, check_rows, divisors, layout_arguments
from simpo_megatron.planning.memory import Memory, Workload, estimate

GPUS_PER_NODE = 8
MOST_GPUS = 1024
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Request:
    """What to plan for.

    Attributes:
        gpu_bytes: memory of a GPU that a run may fill.
        seq_length: tokens of a row.
        packed_rows: of a step, over all ranks.
        slab_bytes: of the head.
        reference: a frozen reference model stays on the GPUs.
    """

    gpu_bytes: int
    seq_length: int
    packed_rows: int
    slab_bytes: int
    reference: bool = False


@dataclass(frozen=True)
class Planned:
    """A layout and what it costs.

    Attributes:
        data_parallel_size: of the layout.
        microbatches: rows of a step a data-parallel rank runs.
        bubble: share of a step in which a pipeline stage waits for the others.
        slowdown: see the head of the module.
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


def fitting(architecture: Architecture, gpus: int, request: Request) -> list[Planned]:
    """The layouts of a model on this many GPUs whose memory suffices, best first."""
    found = [plan(architecture, parallel, gpus, request) for parallel in legal(architecture, gpus, request.seq_length)]
    return sorted((one for one in found if one.memory.total <= request.gpu_bytes), key=lambda one: one.order)


def fewest(architecture: Architecture, request: Request) -> tuple[int, Planned] | None:
    """The smallest number of GPUs on which a layout fits (1, 2, 4, or whole nodes) and the best layout there."""
    for gpus in (1, 2, 4, *range(GPUS_PER_NODE, MOST_GPUS + 1, GPUS_PER_NODE)):
        if found := fitting(architecture, gpus, request):
            return gpus, found[0]
    return None


def plan(architecture: Architecture, parallel: ParallelConfig, gpus: int, request: Request) -> Planned:
    """What a layout costs on this many GPUs."""
    layout = layout_arguments(parallel, architecture.num_layers)
    stages, virtual = parallel.pipeline_model_parallel_size, layout["virtual_pipeline_model_parallel_size"] or 1
    data = gpus // (parallel.tensor_model_parallel_size * parallel.context_parallel_size * stages)
    microbatches = max(1, math.ceil(request.packed_rows / data))
    if virtual > 1:  # the interleaved schedule takes a multiple of the stages: the rest are empty rows
        microbatches = math.ceil(microbatches / stages) * stages
    waiting = (stages - 1) / virtual
    recompute = 4 / 3 if parallel.recompute_granularity == "full" else 1
    work = Workload(
        world_size=gpus,
        seq_length=request.seq_length,
        microbatches=microbatches,
        slab_bytes=request.slab_bytes,
        reference=request.reference,
    )
    return Planned(
        parallel,
        data,
        microbatches,
        bubble=waiting / (microbatches + waiting),
        slowdown=(microbatches + waiting) * recompute / (request.packed_rows / data),
        memory=estimate(architecture, layout, work),
    )


def legal(architecture: Architecture, gpus: int, seq_length: int) -> Iterator[ParallelConfig]:
    """The layouts of a model on this many GPUs that the limits allow."""
    model = architecture.transformer
    for base in _dense(architecture.num_layers, gpus):
        for parallel in _with_experts(base, architecture.num_experts):
            try:
                layout = layout_arguments(parallel, architecture.num_layers)
                check_layout(model, layout)
                check_rows(seq_length, parallel)
                check_processes(gpus, architecture.num_experts is not None, layout)
            except UserError:
                continue
            yield parallel


def _dense(num_layers: int, gpus: int) -> Iterator[ParallelConfig]:
    """Tensor, pipeline, virtual and context sizes and recomputation; the GPUs that are left are data-parallel."""
    for tensor in divisors(math.gcd(gpus, GPUS_PER_NODE)):
        for stages in (n for n in divisors(gpus // tensor) if n <= num_layers):
            for context in divisors(math.gcd(gpus // (tensor * stages), GPUS_PER_NODE)):
                for pipeline in _pipelines(num_layers, stages):
                    for recompute in ({}, FULL):
                        yield ParallelConfig(
                            tensor_model_parallel_size=tensor,
                            sequence_parallel=tensor > 1,
                            context_parallel_size=context,
                            **pipeline,
                            **recompute,
                        )


def _pipelines(num_layers: int, stages: int) -> Iterator[dict[str, Any]]:
    """Ways to cut the layers into stages."""
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
    """The layout with every way to spread the experts; as it is for a dense model."""
    if experts is None:
        yield base
        return
    for size in divisors(experts):
        for tensor in sorted({1, base.tensor_model_parallel_size}):
            yield replace(base, expert_model_parallel_size=size, expert_tensor_parallel_size=tensor)
