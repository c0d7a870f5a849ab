"""What a process sets before CUDA starts, which GPU it takes, and what the first lines say about its environment."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from simpo_megatron.config.arguments import parse
from simpo_megatron.errors import UserError
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.trainer import console, environment, timing
from simpo_megatron.trainer.distributed import resolve_device

ENOUGH = ["--hf-checkpoint", "m", "--train-data", "d.jsonl", "--train-iters", "1"]
NAMES = (*environment._ALLOCATOR, *environment._DETERMINISTIC)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment without any of the variables, put back afterwards with torch's switch."""
    for name in (*NAMES, "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "")  # so that it is removed again if the test sets it
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", environment._ALLOCATOR)
def test_the_allocator_is_set_unless_the_user_has_set_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    environment.prepare_environment(deterministic=False)
    assert [os.environ[name] for name in environment._ALLOCATOR] == ["expandable_segments:True"] * 2
    for each in environment._ALLOCATOR:
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    environment.prepare_environment(deterministic=False)
    assert [os.environ.get(each) for each in environment._ALLOCATOR if each != name] == [None]
    assert not torch.are_deterministic_algorithms_enabled() and "NCCL_ALGO" not in os.environ


def test_buffers_of_nccl_need_an_allocator_without_expandable_segments() -> None:
    """The program does not set what Megatron then refuses."""
    config = parse([*ENOUGH, "--ddp-config", "nccl_ub=true"])
    with pytest.raises(UserError, match=r"--ddp-config nccl_ub registers buffers with NCCL, and this run is on a CPU"):
        resolve_device("cpu", nccl_buffers=config.megatron.nccl_buffers)
    assert not any(name in os.environ for name in environment._ALLOCATOR)


def test_deterministic_mode_sets_what_megatron_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    environment.prepare_environment(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["NCCL_ALGO"] == "Tree", "what the user sets stays, if it is deterministic"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("NCCL_ALGO", "NVLS", "Ring or Tree or CollnetDirect or CollnetChain or ^NVLS"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1", "0"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", ":4096:8 or :16:8"),
    ],
)
def test_a_conflict_is_a_sentence(monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        environment.prepare_environment(deterministic=True)
    wanted = f"--deterministic-mode: {name} is {value}, which is not deterministic; unset it, or set it to {allowed}"
    assert str(raised.value) == wanted and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "variables, gpu",
    [
        ({}, 0),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0),
        ({"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "SLURM_LOCALID": "5"}, 3),
        ({"RANK": "11", "WORLD_SIZE": "16", "SLURM_LOCALID": "5"}, 5),
    ],
)
def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], gpu: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.local_gpu() == gpu


def test_processes_that_nobody_numbered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would all take GPU 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="LOCAL_RANK is not set, so that every process would take the first GPU"):
        environment.local_gpu()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 of this node finds 1 GPU; start at most as many processes"):
        environment.local_gpu()


def test_reserved_memory_stands_beside_the_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.memory().keys() == {"memory_gib"}, "a CPU reserves nothing"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 * 2**30)
    assert timing.memory() == {"memory_gib": 3, "memory_reserved_gib": 5}
    assert console._readable(timing.memory(), console.STEP_COLUMNS) == "GiB 3.0  reserved 5.0"


TP2 = ParallelConfig(tensor_model_parallel_size=2)


@pytest.mark.parametrize(
    "parallel, gpu, capability, value, said",
    [
        (TP2, True, (9, 0), None, "not set"),
        (TP2, True, (9, 0), "8", "8"),
        (ParallelConfig(context_parallel_size=2), True, (8, 0), None, "not set"),
        (TP2, True, (9, 0), "1", None),
        (TP2, True, (10, 0), None, None),
        (TP2, False, (9, 0), None, None),
        (ParallelConfig(), True, (9, 0), None, None),
    ],
)
def test_connections_are_named_where_they_matter(
    monkeypatch: pytest.MonkeyPatch,
    parallel: ParallelConfig,
    gpu: bool,
    capability: tuple[int, int],
    value: str | None,
    said: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if value is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
    warnings = environment.connection_warnings(parallel)
    assert [text.partition(":")[0] for text in warnings] == ([f"CUDA_DEVICE_MAX_CONNECTIONS is {said}"] if said else [])
