"""The environment of a process: what must be set before CUDA starts, which GPU the process takes, and what is missing.

prepare_environment(deterministic)      # before the first call of torch.cuda that starts CUDA
torch.cuda.set_device(local_gpu())
"""

from __future__ import annotations

import os

import torch

from simpo_megatron.errors import UserError
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.settings import require

# Both names of one variable: torch before 2.9 reads the second.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# What --deterministic-mode sets, and the other values that it accepts. Those of NCCL_ALGO are Megatron-LM's
# (`arguments.py`): NVLS adds in the switches, in an order that differs from run to run.
_DETERMINISTIC = {
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}


def prepare_environment(deterministic: bool, nccl_buffers: bool = False) -> None:
    """Sets what CUDA, NCCL and cuBLAS read when they start, unless the user has set it.

    The allocator gets `expandable_segments:True`: packed rows have different lengths, which would fragment its memory.

    Args:
        deterministic: --deterministic-mode. It also tells torch to use deterministic algorithms, and to raise an error
            where there is none.
        nccl_buffers: --ddp-config nccl_ub=true, with which Megatron allows no expandable segments.

    Raises:
        UserError: the environment forbids a deterministic run.
    """
    if not nccl_buffers and not any(name in os.environ for name in _ALLOCATOR):
        os.environ.update(dict.fromkeys(_ALLOCATOR, "expandable_segments:True"))
    if not deterministic:
        return
    for name, allowed in _DETERMINISTIC.items():
        value = os.environ.setdefault(name, allowed[0])
        require(
            value in allowed,
            f"--deterministic-mode: {name} is {value}, which is not deterministic; unset it, or set it to "
            f"{' or '.join(allowed)}",
        )
    torch.use_deterministic_algorithms(True)


def local_gpu() -> int:
    """The index of the GPU that this process takes: its number on the node, from torchrun or from Slurm.

    Raises:
        UserError: there are several processes and neither has numbered them, or there is no GPU with that index.
    """
    number = os.environ.get("LOCAL_RANK")
    if number is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        number = os.environ.get("SLURM_LOCALID")
        if number is None:
            raise UserError(
                "LOCAL_RANK is not set, so that every process would take the first GPU of its node; start the "
                "processes with torchrun, or set LOCAL_RANK to the number of the process on its node"
            )
    index, count = int(number or 0), torch.cuda.device_count()
    require(
        index < count,
        f"process {index} of this node finds {count} GPU{'' if count == 1 else 's'}; start at most as many processes a "
        "node as it has GPUs, or set LOCAL_RANK to 0 where each process sees a GPU of its own",
    )
    return index


def connection_warnings(parallel: ParallelConfig) -> list[str]:
    """A sentence if CUDA_DEVICE_MAX_CONNECTIONS should be 1 and is not.

    Before Blackwell, communication of tensor and context parallelism overlaps with computation only if kernels start in
    the order of their launch. One connection makes them do so. Megatron-LM demands it (`arguments.py`).

    Args:
        parallel: the layout of the run. On a GPU, CUDA has started.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if (
        parallel.tensor_model_parallel_size * parallel.context_parallel_size == 1
        or os.environ.get(name) == "1"
        or not torch.cuda.is_initialized()
        or torch.cuda.get_device_capability() >= (10, 0)
    ):
        return []
    return [
        f"{name} is {os.environ.get(name, 'not set')}: on this GPU tensor and context parallelism do not overlap "
        f"communication with computation; export {name}=1"
    ]
