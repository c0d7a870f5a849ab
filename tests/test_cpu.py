"""`cpu.py` replaces what its table lists and nothing else, and everything can be put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from simpo_megatron import cpu
from tests.support.distributed import WorkerPool

CPU = torch.device("cpu")
# The names in the table, by the module that holds them.
REPLACED: dict[Any, set[str]] = {
    torch.cuda: {
        "current_device",
        "Stream",
        "Event",
        "stream",
        "current_stream",
        "default_stream",
        "synchronize",
        "empty_cache",
        "manual_seed",
        "get_rng_state",
        "set_rng_state",
    },
    torch.autograd: {"_engine_run_backward"},
    torch.distributed: {"all_to_all_single", "all_gather", "reduce_scatter"},
    torch.distributed.Work: {"wait"},
    torch.cuda.random: {"get_rng_state", "set_rng_state"},
    megatron_random: {"_get_cuda_rng_state", "_set_cuda_rng_state"},
}


def snapshot() -> dict[tuple[str, str], Any]:
    return {(module.__name__, name): value for module in REPLACED for name, value in vars(module).items()}


@pytest.fixture(autouse=True)
def as_it_began() -> Iterator[None]:
    """Every test starts with nothing replaced, and leaves the process as it was."""
    was_enabled, rng_state = bool(cpu._undo), torch.get_rng_state()
    cpu.disable()
    yield
    cpu.disable()
    torch.set_rng_state(rng_state)
    if was_enabled:
        cpu.enable()


@pytest.fixture
def enabled(as_it_began: None) -> None:
    cpu.enable()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3", torch.device("cuda"), torch.device("cuda", 1)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.empty(2, device=device),
        lambda device: torch.tensor([1.0, 2.0], device=device),
        lambda device: torch.arange(2, dtype=torch.float32, device=device),
        lambda device: torch.empty_like(torch.zeros(2), device=device),
        lambda device: torch.zeros(2).new_empty(2, device=device),
        lambda device: torch.zeros(2).to(device),
        lambda device: torch.zeros(2).to(device, torch.float32),
        lambda device: torch.zeros(2).to(device=device),
        lambda device: torch.zeros(2).cuda(device),
        lambda device: torch.nn.Linear(2, 1, bias=False, device=device).weight[0],
    ],
)
def test_cuda_devices_are_the_cpu(enabled: None, make: Callable[[Any], torch.Tensor], device: Any) -> None:
    tensor = make(device)
    assert tensor.device == CPU and tensor.shape == (2,) and tensor.dtype == torch.float32


def test_other_conversions_are_left_alone(enabled: None) -> None:
    values = torch.tensor([1.5, 2.5])
    assert values.cuda() is values
    assert values.to(torch.float64).dtype == torch.float64
    assert values.to("cuda", torch.bfloat16).dtype == torch.bfloat16
    assert torch.empty(1, device="meta").device.type == "meta"
    assert values.to("meta").device.type == "meta"


def test_cuda_devices_are_the_cpu_in_a_backward_pass(enabled: None) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return 2 * values

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return (grads[0] * torch.full((), 2.0, device="cuda")).cuda()

    values = torch.ones(2, requires_grad=True)
    Scaled.apply(values).sum().backward()  # type: ignore[attr-defined]
    assert values.grad is not None and values.grad.tolist() == [2, 2]
    assert torch.autograd.grad(Scaled.apply(values).sum(), values)[0].tolist() == [2, 2]  # type: ignore[attr-defined]


def exchange_and_wait_twice() -> list[float]:
    import torch.distributed as dist

    other, received = 1 - dist.get_rank(), torch.zeros(3)
    sent = torch.full((3,), float(dist.get_rank()))
    requests = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
    for request in dist.batch_isend_irecv(requests):
        request.wait()
        request.wait()
    return received.tolist()


def test_a_request_can_be_waited_for_twice(pool: WorkerPool) -> None:
    assert pool.run(2, exchange_and_wait_twice) == [[1, 1, 1], [0, 0, 0]]


def test_tensor_types_are_named_as_on_cuda(enabled: None) -> None:
    for dtype, name in (
        (torch.float32, "FloatTensor"),
        (torch.float16, "HalfTensor"),
        (torch.bfloat16, "BFloat16Tensor"),
    ):
        assert torch.empty(1, dtype=dtype).type() == f"torch.cuda.{name}"
    assert torch.nn.Parameter(torch.empty(1)).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.int64).dtype == torch.int64, "with an argument, type() converts"


def test_current_device_is_a_device(enabled: None) -> None:
    assert torch.cuda.current_device() == CPU
    assert torch.ones(1, device=torch.cuda.current_device()).device == CPU


def test_streams_and_events_do_nothing(enabled: None) -> None:
    stream = torch.cuda.Stream()
    for other in (torch.cuda.current_stream(), torch.cuda.default_stream(), torch.cuda.Stream(priority=-1)):
        stream.wait_stream(other)
    event = torch.cuda.Event(enable_timing=False)
    with torch.cuda.stream(stream):
        event.record(stream)
        event.record()
        recorded = stream.record_event()
    stream.wait_event(recorded)
    event.wait(stream)
    event.wait()
    event.synchronize()
    stream.synchronize()
    assert event.query() and stream.query()
    torch.cuda.synchronize()
    torch.cuda.synchronize(0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "owner, get, put",
    [
        (torch.cuda, "get_rng_state", "set_rng_state"),
        (torch.cuda.random, "get_rng_state", "set_rng_state"),
        (megatron_random, "_get_cuda_rng_state", "_set_cuda_rng_state"),
    ],
)
def test_random_state_is_the_cpu_generator(enabled: None, owner: ModuleType, get: str, put: str) -> None:
    torch.cuda.manual_seed(7)
    state = getattr(owner, get)()
    drawn = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), drawn)
    getattr(owner, put)(state)
    assert torch.equal(torch.rand(4), drawn)


def test_nothing_is_compiled(enabled: None) -> None:
    compiling = []

    @torch.compile(backend="eager")
    def python(x: torch.Tensor) -> torch.Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x + 1

    python(torch.ones(2))
    assert compiling == [False]


def test_availability_is_still_the_truth(enabled: None) -> None:
    cpu.disable()
    truth = torch.cuda.is_available()
    cpu.enable()
    assert torch.cuda.is_available() == truth


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_replaced_is_the_table_and_is_put_back(times: int) -> None:
    before, dynamo = snapshot(), torch._dynamo.config.disable
    for _ in range(times):
        cpu.enable()
    assert torch.empty(1).type() == "torch.cuda.FloatTensor", "replaced once, however often it is enabled"
    after = snapshot()
    changed = {name for name in before | after if before.get(name) is not after.get(name)}
    assert changed == {(module.__name__, name) for module, names in REPLACED.items() for name in names}
    cpu.disable()
    assert all(before[name] is value for name, value in snapshot().items())
    assert torch._dynamo.config.disable == dynamo
    assert torch.empty(1).type() == "torch.FloatTensor"
    assert torch.overrides._len_torch_function_stack() == 0
    cpu.disable()  # nothing left to put back, and no error


def test_refused_once_cuda_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="after CUDA was initialised"):
        cpu.enable()
    monkeypatch.undo()
    assert all(before[name] is value for name, value in snapshot().items())
    assert torch.empty(1).type() == "torch.FloatTensor"
