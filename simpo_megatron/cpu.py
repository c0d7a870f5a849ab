"""Megatron-Core on CPU: replaces the functions of `torch.cuda` that Megatron calls, where no CUDA device is used.

Megatron-Core asks `torch.cuda` for its device, its streams and its random state on every machine. The schedules, the
tensor- and sequence-parallel layers, DDP, the distributed optimizer and dist_checkpointing are plain torch, and run
over gloo once these calls return something useful. Call `enable()` before the first Megatron object is built:

    from simpo_megatron import cpu
    cpu.enable()          # a second call does nothing; raises if CUDA has been initialised

These names are replaced, and no others:

=============================================  ======================================================================
name                                           what it returns or does then
=============================================  ======================================================================
`device="cuda"`, `"cuda:N"` in any function     means the CPU (`_CudaMeansCpu`, a TorchFunctionMode)
`tensor.cuda()`, `tensor.to("cuda")`           the tensor on the CPU (the same mode)
`torch.autograd._engine_run_backward`          the same, with the mode on: torch turns modes off for the backward
                                               pass, where Transformer Engine asks for `.cuda()`
`tensor.type()`                                `torch.cuda.FloatTensor` and so on, because the optimizers compare
                                               strings (`optimizer/distrib_optimizer.py`, `optimizer/optimizer.py`)
`torch.cuda.current_device`                    `torch.device("cpu")`, which `device=` accepts everywhere
`torch.cuda.Stream`, `Event`, `stream`,        objects that do nothing: the CPU runs in program order
`current_stream`, `default_stream`
`torch.cuda.synchronize`, `empty_cache`        nothing
`torch.cuda.manual_seed`, `get_rng_state`,     the CPU generator (also `torch.cuda.random.get_rng_state` and the
`set_rng_state`                                private getter and setter of `tensor_parallel.random`)
`torch.distributed.all_to_all_single`          the same with split sizes as lists: Megatron's token dispatcher
                                               passes tensors, which gloo refuses
`torch.distributed.all_gather`,                the same, also for lists of tensors of unequal length, which gloo
`reduce_scatter`                               refuses: experts that are split over ranks need it
`torch.distributed.Work.wait`                  the first time only: a second wait for one request, as in Transformer
                                               Engine's ring attention, would wait for ever with gloo
`torch._dynamo.config.disable`                 True: `jit_fuser` is torch.compile, which compiles for minutes
=============================================  ======================================================================

`torch.cuda.is_available()` still returns False. What Megatron does only on CUDA (fused kernels, CUDA graphs, FP8)
cannot run. `disable()` puts everything back; only tests need it.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_dist_all_to_all_single, _dist_all_gather, _dist_reduce_scatter = (
    dist.all_to_all_single,
    dist.all_gather,
    dist.reduce_scatter,
)
_undo: list[Callable[[], None]] = []


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces `cuda` by `cpu` in the arguments of every torch function, and gives tensor types their CUDA names."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))


class _Inert:
    """A stream or an event of a device that runs in program order. Its methods do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Inert:
        return self

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    yield


_run_backward = torch.autograd._engine_run_backward  # pyright: ignore[reportPrivateImportUsage]
_wait = dist.Work.wait
_waited: weakref.WeakSet[Any] = weakref.WeakSet()  # the requests that have been answered


def _run_backward_with_mode(*args: Any, **kwargs: Any) -> Any:
    with _CudaMeansCpu():
        return _run_backward(*args, **kwargs)


def _wait_once(work: Any, *args: Any, **kwargs: Any) -> Any:
    if work not in _waited:
        _wait(work, *args, **kwargs)
        _waited.add(work)
    return True


def _nothing() -> Callable[..., None]:
    """A new function that does nothing; a new one each time, because dynamo looks functions up by identity."""
    return lambda *args, **kwargs: None


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _all_to_all_single(
    output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **rest: Any
) -> Any:
    def listed(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    return _dist_all_to_all_single(output, input, listed(output_split_sizes), listed(input_split_sizes), **rest)


def _all_gather(tensor_list: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
    longest = max(len(output) for output in tensor_list)
    if async_op or all(len(output) == longest for output in tensor_list):
        return _dist_all_gather(tensor_list, tensor, group=group, async_op=async_op)
    padded = [tensor.new_zeros(longest, *tensor.shape[1:]) for _ in (tensor, *tensor_list)]
    padded[0][: len(tensor)] = tensor
    _dist_all_gather(padded[1:], padded[0], group=group)
    for output, whole in zip(tensor_list, padded[1:], strict=True):
        output.copy_(whole[: len(output)])
    return None


def _reduce_scatter(
    output: Any, input_list: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    if async_op or len({len(piece) for piece in input_list}) == 1:
        return _dist_reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    whole = torch.cat(list(input_list))
    dist.all_reduce(whole, op=op, group=group)
    output.copy_(whole.split([len(piece) for piece in input_list])[dist.get_rank(group)])
    return None


def _replace(owner: Any, name: str, value: Any) -> None:
    old = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, old))


def enable() -> None:
    """Replaces the names in the table above, in this process. A second call does nothing.

    Raises:
        RuntimeError: CUDA is already initialised in this process, so tensors may be on a GPU.
    """
    if _undo:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("cpu.enable() was called after CUDA was initialised; call it first, or run on the GPU")
    _replace(torch._dynamo.config, "disable", True)
    _replace(torch.cuda, "current_device", lambda: _CPU)
    for name in ("Stream", "Event"):
        _replace(torch.cuda, name, _Inert)
    for name in ("current_stream", "default_stream"):
        _replace(torch.cuda, name, _Inert)
    _replace(torch.cuda, "stream", _stream)
    for name in ("synchronize", "empty_cache"):
        _replace(torch.cuda, name, _nothing())
    _replace(torch.cuda, "manual_seed", torch.manual_seed)
    _replace(torch.autograd, "_engine_run_backward", _run_backward_with_mode)
    _replace(dist.Work, "wait", _wait_once)
    _replace(dist, "all_to_all_single", _all_to_all_single)
    _replace(dist, "all_gather", _all_gather)
    _replace(dist, "reduce_scatter", _reduce_scatter)
    for owner in (torch.cuda, torch.cuda.random):
        _replace(owner, "get_rng_state", _get_rng_state)
        _replace(owner, "set_rng_state", _set_rng_state)

    from megatron.core.tensor_parallel import random

    _replace(random, "_get_cuda_rng_state", _get_rng_state)
    _replace(random, "_set_cuda_rng_state", _set_rng_state)
    mode = _CudaMeansCpu()
    mode.__enter__()
    _undo.append(lambda: mode.__exit__(None, None, None))


def enable_megatron_lm_without_gpu() -> None:
    """Lets Megatron-LM's own `pretrain()` start where there is no CUDA device. It does nothing where there is one.

    It calls `enable()`, and replaces what only `megatron.training` calls: it asserts that CUDA is available, counts
    devices, asks for their architecture and compiles kernels for it, none of which a CPU run uses. Call it before
    `megatron.training` is imported.
    """
    if torch.cuda.is_available():
        return
    enable()
    properties = SimpleNamespace(major=10, minor=0, total_memory=0, name="cpu")
    _replace(torch.cuda, "is_available", lambda: True)
    _replace(torch.cuda, "device_count", lambda: 1)
    _replace(torch.cuda, "set_device", _nothing())
    _replace(torch.cuda, "get_device_properties", lambda *args: properties)
    kernels = importlib.import_module("megatron.legacy.fused_kernels")
    _replace(kernels, "load", _nothing())


def disable() -> None:
    """Puts every name back as it was. Only tests need it."""
    while _undo:
        _undo.pop()()
