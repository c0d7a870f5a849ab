"""One measurement of `bench_head.py`: time, memory, collectives and gradients of one implementation, on one rank.

`bench_head.py` starts these processes and reads what they print.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

from head_peers import IMPLEMENTATIONS, ObjectiveProblem, Problem, Shape

MIB = 2**20


def memory(field: str, pid: int | str = "self") -> int:
    """Bytes of resident memory of a process: now (VmRSS), or at most so far (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no {field}")


class Meter:
    """Measures seconds and peak extra memory of a pass."""

    def __init__(self, device: str) -> None:
        """Measures on `device`, cpu or cuda."""
        self.cuda = device == "cuda"

    def start(self) -> None:
        """Starts the clock and forgets the peak of the memory so far."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # memory that is freed but kept would hide as much new memory
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.base = memory("VmRSS")
            print(json.dumps({"base": self.base}), flush=True)  # in case bench_head.py has to stop this process
        self.started = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        """Seconds since the start, and the peak beyond what was held then."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        return seconds, (torch.cuda.max_memory_allocated() if self.cuda else memory("VmHWM")) - self.base


def floor(problem: Problem) -> float:
    """Seconds of the three GEMMs over the response tokens."""
    import torch

    from simpo_megatron.compat import have_native_bf16

    emulated = problem.weight.dtype == torch.bfloat16 and not (problem.weight.is_cuda or have_native_bf16())
    dtype = torch.float32 if emulated else problem.weight.dtype
    hidden, weight = problem.hidden_TH.detach()[problem.positions_R].to(dtype), problem.weight.detach().to(dtype)
    logits, grad_hidden, grad_weight = hidden.new_zeros(len(hidden), len(weight)), hidden.clone(), weight.clone()

    def gemms() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    started = time.perf_counter()
    if problem.weight.is_cuda:
        gemms()
        torch.cuda.synchronize()
        started = time.perf_counter()
        gemms()
        torch.cuda.synchronize()
    else:
        gemms()
    return time.perf_counter() - started


def count_collectives() -> dict[str, int]:
    """Wraps torch's collectives. Returns how often each was called, which changes with every further call."""
    import torch.distributed as dist

    counts: dict[str, int] = {}

    def counting(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        setattr(dist, name, counting(name, getattr(dist, name)))
    return counts


def compare_objectives(problem: ObjectiveProblem, names: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Measures our head with the losses of several objectives, in turn, so that a busy machine slows all of them alike.

    Args:
        problem: the inputs; `keep_main_grad` has been called.
        names: of objectives, with their default settings. The first is the one that the others are compared with.
        repeats: how often each is measured.

    Returns:
        By objective: `milliseconds` (the best), `floor_milliseconds` of the GEMMs, `ratio` (the median of its time by
        the time of the first in the same repeat; on a CPU the time of its cores, which other processes change less) and
        `peak_extra_bytes`.
    """
    from statistics import median

    from simpo_megatron.objectives import OBJECTIVES

    meter = Meter(problem.weight.device.type)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
    floors, peaks = [], dict.fromkeys(names, 0)
    for repeat in range(repeats + 1):  # the first is a warm-up
        floors.append(floor(problem))
        for name in names if repeat % 2 else [names[0], *reversed(names[1:])]:
            problem.objective = OBJECTIVES[name]()
            problem.weight.main_grad.zero_()  # type: ignore[attr-defined]
            problem.hidden_TH.grad = None
            meter.start()
            used = time.process_time()
            IMPLEMENTATIONS["ours"](problem).backward()
            used = time.process_time() - used
            took, peak = meter.stop()
            if repeat:
                seconds[name].append(took)
                costs[name].append(took if meter.cuda else used)
                peaks[name] = max(peaks[name], peak)
    return {
        name: {
            "milliseconds": 1e3 * min(seconds[name]),
            "floor_milliseconds": 1e3 * min(floors),
            "ratio": median(own / first for own, first in zip(costs[name], costs[names[0]], strict=True)),
            "peak_extra_bytes": peaks[name],
        }
        for name in names
    }


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one shard, in a process of its own.

    Args:
        args: of the command line of `bench_head.py`, with one implementation, shape and dtype.

    Returns:
        What is measured, by the columns of `bench_head.py`; with --objective, that of each under `objectives`.
    """
    import torch
    import torch.distributed as dist

    from simpo_megatron import compat, cpu

    rank, shape = int(os.environ["RANK"]), Shape.parse(args.shapes[0])
    compat.quiet_megatron()
    if args.device == "cpu":
        cpu.enable()
        torch.set_num_threads(max(1, args.threads // shape.tensor_parallel))
    else:
        torch.cuda.set_device(rank)
    counts = count_collectives()  # before Megatron takes its own references
    from megatron.core import parallel_state

    dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    parallel_state.initialize_model_parallel(shape.tensor_parallel)
    dtype, run, meter = getattr(torch, args.dtypes[0]), IMPLEMENTATIONS[args.only], Meter(args.device)
    tiny = Problem(Shape(1, 4, 0, 64, 128 * shape.tensor_parallel, shape.tensor_parallel), dtype, args.device, rank)
    tiny.slab_bytes = MIB
    tiny.keep_main_grad()
    run(tiny).backward()

    problem = (ObjectiveProblem if args.objective else Problem)(shape, dtype, args.device, rank)
    problem.slab_bytes = args.slab_mib * MIB
    problem.keep_main_grad()
    if isinstance(problem, ObjectiveProblem):
        return {"objectives": compare_objectives(problem, args.objective, args.repeats)}
    found: dict[str, Any] = {"milliseconds": float("inf"), "floor_milliseconds": float("inf")}
    for _ in range(args.repeats):
        found["floor_milliseconds"] = min(found["floor_milliseconds"], 1e3 * floor(problem))
        print(json.dumps(found).replace("Infinity", "null"), flush=True)
        problem.weight.main_grad.zero_()  # type: ignore[attr-defined]
        problem.hidden_TH.grad = None
        counts.clear()
        meter.start()
        run(problem).backward()
        seconds, found["peak_extra_bytes"] = meter.stop()
        found["milliseconds"] = min(found["milliseconds"], 1e3 * seconds)
    found["collectives"] = " ".join(f"{name}:{count}" for name, count in sorted(counts.items())) or "none"
    if rank == 0:
        assert problem.hidden_TH.grad is not None
        torch.save((problem.hidden_TH.grad.cpu(), problem.weight.main_grad.cpu()), args.gradients)  # type: ignore[attr-defined]
    return found
