"""What lets Megatron's optimizer for host memory run where all memory is host memory.

It cuts the parameters by asking each tensor whether it is on a GPU. Inside the block it is told so, unless it has
pinned the tensor itself, or has made it from such a tensor. Its arithmetic, its bookkeeping and its checkpoints are
Megatron's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
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

    host, on_gpu = WeakTensorKeyDictionary(), optimizer.on_gpu
    names = ("is_cuda", "pin_memory", "detach", "clone", "float")
    old: dict[str, Any] = {name: getattr(torch.Tensor, name) for name in names}

    def is_cuda(self: torch.Tensor) -> bool:
        asked = sys._getframe(1).f_globals.get("__name__") == hybrid_optimizer.__name__
        return self not in host if asked else old["is_cuda"].__get__(self)

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        host[self] = True
        return self

    def marking(name: str) -> Callable[..., torch.Tensor]:
        def made(self: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
            found = old[name](self, *args, **settings)
            if self in host:
                host[found] = True
            return found

        return made

    new = {"is_cuda": property(is_cuda), "pin_memory": pin_memory}
    new |= {name: marking(name) for name in ("detach", "clone", "float")}
    for name, value in new.items():
        setattr(torch.Tensor, name, value)
    optimizer.on_gpu = lambda: True
    try:
        yield
    finally:
        optimizer.on_gpu = on_gpu
        for name, value in old.items():
            setattr(torch.Tensor, name, value)
