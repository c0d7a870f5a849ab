"""Processes: start them, cut them into Megatron's groups, and let them fail together."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig

from simpo_megatron import cpu
from simpo_megatron.data import InMemoryPairs
from simpo_megatron.errors import UserError
from simpo_megatron.parallel.limits import check_processes


def resolve_device(device: str) -> str:
    """`cuda` or `cpu` for `--device auto|cpu|cuda`; on `cpu` Megatron is told so (`cpu.enable`)."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda finds no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        cpu.enable()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return device


def initialize(layout: TransformerConfig, timeout_minutes: int, device: str, seed: int) -> None:
    """Joins the processes torchrun started (or runs as one) and builds Megatron's process groups for the layout.

    Raises:
        UserError: the number of processes does not fit the layout.
    """
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if device == "cuda" else "gloo"
    if dist.is_initialized():
        pass  # the caller's processes: a test, or another program
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    check_processes(dist.get_world_size(), layout.num_moe_experts is not None, vars(layout))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shut_down() -> None:
    """Leaves the groups, so that no process outlives the run."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def broadcast_pairs(pairs: InMemoryPairs | None) -> InMemoryPairs:
    """Rank 0's tokenized pairs on every rank.

    Collectives: one broadcast of names, types and shapes, and one of each array.

    Args:
        pairs: those to send, on rank 0; None on the other ranks.
    """
    arrays: dict[str, np.ndarray] = {} if pairs is None else pairs.arrays()
    header: list[Any] = [{name: (array.dtype.str, array.shape) for name, array in arrays.items()}]
    dist.broadcast_object_list(header, src=0)
    received = {}
    for name, (dtype, shape) in header[0].items():
        array = arrays.get(name)
        host = torch.from_numpy(np.empty(shape, dtype) if array is None else np.ascontiguousarray(array))
        tensor = host.to(torch.cuda.current_device())
        dist.broadcast(tensor, src=0)
        received[name] = tensor.cpu().numpy()
    return InMemoryPairs.from_arrays(received)
