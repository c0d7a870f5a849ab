"""What lets Megatron's optimizer for host memory run where all memory is host memory.

It cuts the parameters by asking each tensor whether it is on a GPU. Inside the block it is told so, unless it has
pinned the tensor itself. Its arithmetic, its bookkeeping and its checkpoints are Megatron's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Pinned memory needs CUDA.
UNPINNED = ["--optimizer-config", "pin_cpu_grads=false"]


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """On a rank: --optimizer-cpu-offload works inside the block."""
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    from simpo_megatron.trainer import optimizer

    host, tensor = WeakTensorKeyDictionary(), torch.Tensor
    old: Any = (tensor.is_cuda, tensor.pin_memory, tensor.float, optimizer.on_gpu)

    def is_cuda(self: torch.Tensor) -> bool:
        asked = sys._getframe(1).f_globals.get("__name__") == hybrid_optimizer.__name__
        return self not in host if asked else old[0].__get__(self)

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        host[self] = True
        return self

    def to_float(self: torch.Tensor) -> torch.Tensor:
        found = old[2](self)
        if self in host:
            host[found] = True
        return found

    tensor.is_cuda = property(is_cuda)  # type: ignore[assignment]
    tensor.pin_memory, tensor.float = pin_memory, to_float  # type: ignore[method-assign, assignment]
    optimizer.on_gpu = lambda: True
    try:
        yield
    finally:
        tensor.is_cuda, tensor.pin_memory, tensor.float, optimizer.on_gpu = old
