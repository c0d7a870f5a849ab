"""The processes of a run: the device, Megatron's process groups, and sending pairs from rank 0 to all."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig

from simpo_megatron import compat, cpu
from simpo_megatron.data import InMemoryPairs
from simpo_megatron.errors import UserError
from simpo_megatron.parallel.limits import check_processes
from simpo_megatron.parallel.together import host_group, start_host_group
from simpo_megatron.settings import require
from simpo_megatron.trainer.environment import local_gpu, prepare_environment


def resolve_device(device: str, deterministic: bool = False, nccl_buffers: bool = False) -> str:
    """Chooses the device and prepares it: selects this rank's GPU, or lets Megatron run on the CPU (`cpu.enable`).

    Args:
        device: `--device`: auto, cpu or cuda.
        deterministic: `--deterministic-mode`.
        nccl_buffers: `--ddp-config nccl_ub=true`.

    Returns:
        `cuda` or `cpu`.

    Raises:
        UserError: there is no GPU, and --device cuda or `nccl_ub` needs one; or the environment does not fit
            (`environment.py`).
    """
    prepare_environment(deterministic, nccl_buffers)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda finds no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        require(not nccl_buffers, "--ddp-config nccl_ub registers buffers with NCCL, and this run is on a CPU; drop it")
        compat.quiet_connections()  # they concern GPUs only
        cpu.enable()
    else:
        torch.cuda.set_device(local_gpu())
    return device


def initialize(transformer: TransformerConfig, timeout_minutes: int, device: str, seed: int) -> None:
    """Joins the processes that torchrun started, or runs as one, and builds Megatron's process groups.

    Args:
        transformer: holds the parallel transformer.
        timeout_minutes: of a collective of training. Waits on the host have their own (`parallel/together.py`).
        device: from `resolve_device`; it decides between NCCL and gloo.
        seed: of Megatron's random number generators.

    Raises:
        UserError: the number of processes does not fit the transformer.
    """
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if device == "cuda" else "gloo"
    # NCCL then builds its communicators now, on this GPU, and not in the first step.
    device_id = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
    if dist.is_initialized():
        pass  # the caller's processes: a test, or another program
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout, device_id=device_id)
    start_host_group()
    check_processes(dist.get_world_size(), transformer.num_moe_experts is not None, vars(transformer))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=transformer.tensor_model_parallel_size,
        pipeline_model_parallel_size=transformer.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=transformer.virtual_pipeline_model_parallel_size,
        context_parallel_size=transformer.context_parallel_size,
        expert_model_parallel_size=transformer.expert_model_parallel_size,
        expert_tensor_parallel_size=transformer.expert_tensor_parallel_size,
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

    Collectives, over the host's group: one broadcast of names, types and shapes, and one of each array.

    Args:
        pairs: those to send, on rank 0; None on the other ranks.
    """
    arrays: dict[str, np.ndarray] = {} if pairs is None else pairs.arrays()
    header: list[Any] = [{name: (array.dtype.str, array.shape) for name, array in arrays.items()}]
    dist.broadcast_object_list(header, src=0, group=host_group())
    received = {}
    for name, (dtype, shape) in header[0].items():
        array = arrays.get(name)
        received[name] = np.empty(shape, dtype) if array is None else np.ascontiguousarray(array)
        dist.broadcast(torch.from_numpy(received[name]), src=0, group=host_group())
    return InMemoryPairs.from_arrays(received)
