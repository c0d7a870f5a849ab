"""How fast a run is: tokens and floating-point operations a second, seconds of the parts of a step, time left, memory.

seconds = Seconds()
with seconds.of("data"):
    ...
metrics |= seconds.take()                   # {"seconds/data": 0.01}, and starts again from nothing
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch
import torch.distributed as dist

from simpo_megatron.config.run import Config

# Dense bf16 TFLOP/s of a GPU, from NVIDIA's data sheets, by words in the name that CUDA gives it; the first that fits.
PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250.0),
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.0),
    (("H100",), 989.0),
    (("H200",), 989.0),
    (("GH200",), 989.0),
    (("H800",), 989.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("L40S",), 362.0),
    (("A40",), 149.7),
    (("L4",), 121.0),
    (("A10",), 125.0),
)


def peak_tflops(name: str) -> float | None:
    """The dense bf16 TFLOP/s of a GPU by its name; None if it is not in the table.

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("NVIDIA H100 PCIe"), peak_tflops("Tesla V100")
    (989.0, 756.0, None)
    """
    words = name.replace("-", " ").split()
    return next((peak for wanted, peak in PEAKS if all(word in words for word in wanted)), None)


class Seconds:
    """Adds up the seconds of the parts of a step on this rank.

    The host does not wait for a GPU here. It waits where a step reads the loss and the gradient norm, so kernels that
    are still running when a part ends count for the next part.
    """

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Adds the time of the block to a part."""
        started = time.perf_counter()
        yield
        self._spent[part] = self._spent.get(part, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call, as metrics."""
        spent, self._spent = self._spent, {}
        return {f"seconds/{part}": value for part, value in spent.items()}


class Speed:
    """Measures the steps of a run.

    Args:
        config: of the run.
        steps_left: that this start of the run will take.
    """

    def __init__(self, config: Config, steps_left: int) -> None:
        self._peak = config.log.peak_tflops
        if self._peak is None and config.train.bf16 and torch.cuda.is_initialized():
            self._peak = peak_tflops(torch.cuda.get_device_name())
        self._left, self._taken = steps_left, 0
        self._started = time.perf_counter()

    def measure(self, seconds: float, tokens: int, flops: int) -> dict[str, float]:
        """The metrics of a step that has just ended.

        Args:
            seconds: that it took.
            tokens: of the global batch, without padding.
            flops: of the global batch (`planning/flops.py`).
        """
        self._taken += 1
        tflops = flops / seconds / dist.get_world_size() / 1e12
        mean = (time.perf_counter() - self._started) / self._taken  # with evaluations and checkpoints
        found = {"tokens_per_second": tokens / seconds, "tflops_per_gpu": tflops}
        if self._peak is not None:
            found["mfu"] = tflops / self._peak
        return found | {"seconds/left": mean * max(self._left - self._taken, 0)} | memory()


def memory() -> dict[str, float]:
    """Memory of this rank in GiB: the most of the GPU so far, or what the process holds now on the CPU.

    What torch reserves on a GPU and has not allocated is free for tensors that fit into its gaps only.
    """
    if torch.cuda.is_initialized():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"memory_gib": allocated / 2**30, "memory_reserved_gib": reserved / 2**30}
    return {"memory_gib": psutil.Process().memory_info().rss / 2**30}
