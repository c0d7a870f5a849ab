"""The distributed harness: one pool of gloo processes that every distributed test of the session shares.

    def check(x):                        # module-level, runs on every rank inside torch.distributed
        ...
    def test_it(pool):
        results = pool.run(4, check, 3)  # one result a rank; an exception on any rank fails the test

A pool has one process that imports torch and Megatron, which takes seconds. Its workers are forked from it, and run
task after task. Each task gets a process group of its own and leaves no Megatron state behind. A task that hangs is
killed with the workers of its pool after `TIMEOUT` seconds.

The workers of a pool have Megatron's plain layers, or a release of Transformer Engine on a CPU (`tests/te_on_cpu`):

    @pytest.mark.parametrize("pool", BOTH, indirect=True)      # the test runs with each
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from tests import te_on_cpu

TIMEOUT = 150.0
LOCAL = "local"  # the kind of a pool without Transformer Engine; the other kinds are releases of it
NEWEST = te_on_cpu.NEWEST
# What most tasks import, beside Megatron-Core.
IMPORTED = ("simpo_megatron.train", "simpo_megatron.trainer.loop", "simpo_megatron.trainer.setup", "transformers")
BOTH = [LOCAL, pytest.param(NEWEST, marks=pytest.mark.te)]


class WorkerError(AssertionError):
    """A rank raised; the message is its traceback."""


def _fork_workers(kind: str, connection: Any) -> None:
    """Runs in the first process of a pool: imports what a worker needs, and forks a worker for each connection."""
    if kind != LOCAL:
        te_on_cpu.enable(te_on_cpu.folder(kind))
    import torch

    from simpo_megatron import compat, cpu

    torch.set_num_threads(1)
    compat.quiet_megatron()
    compat.check_megatron_core()
    cpu.enable()
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # what was imported stays: to search it for garbage after every task would take longer than most tasks
    context = mp.get_context("fork")
    while True:
        rank, theirs = connection.recv()
        # Not daemonic: Megatron's checkpoint writer starts processes of its own.
        process = context.Process(target=_serve, args=(rank, theirs))
        process.start()
        theirs.close()
        connection.send(process.pid)


def _serve(rank: int, connection: Any) -> None:
    """Runs in a worker: tasks from the connection, one after the other."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    while True:
        world_size, port, task, function, args = connection.recv()
        try:
            timeout = timedelta(seconds=60)
            store = dist.PrefixStore(str(task), dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
            outcome = (True, function(*args))
        except BaseException:
            outcome = (False, traceback.format_exc())
        finally:
            if parallel_state.is_initialized() or parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_models()
        connection.send(outcome)


def _forget_models() -> None:
    """Frees models and optimizers, and with them the threads of every gloo group that they refer to.

    They refer to themselves. DDP does so through autograd's nodes, which the garbage collector does not see. So DDP's
    references are removed here. Megatron keeps the last 32 rotary embeddings in a cache, and each has a group. What is
    left after that stays: the next task need not search it again.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

    from simpo_megatron.parallel.together import forget_host_group

    forget_host_group()
    for kind in (RotaryEmbedding, YarnRotaryEmbedding):
        forward: Any = kind.forward
        forward.cache_clear()
    for wrapped in gc.get_objects():
        if type(wrapped) is DistributedDataParallel:
            vars(wrapped).clear()
    gc.collect()
    gc.freeze()


class WorkerPool:
    """Worker processes, which start when a task first needs them.

    Attributes:
        kind: `LOCAL`, or the release of Transformer Engine that the workers have.
        workers: process and connection of each rank.
        store: the TCP store through which the process groups meet.
        tasks: how many tasks have run.
    """

    def __init__(self, kind: str = LOCAL) -> None:
        self.kind = kind
        self.context = mp.get_context("spawn")
        self.workers: list[tuple[psutil.Process, Any]] = []
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.tasks = 0

    @functools.cached_property
    def _first(self) -> tuple[Any, Any]:
        """The process that workers are forked from, and the connection to it."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_fork_workers, args=(self.kind, theirs))
        process.start()
        theirs.close()
        return process, ours

    def _grow(self, size: int) -> None:
        while len(self.workers) < size:
            ours, theirs = self.context.Pipe()
            self._first[1].send((len(self.workers), theirs))
            self.workers.append((psutil.Process(self._first[1].recv()), ours))
            theirs.close()

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs `function(*args)` on ranks 0 .. world_size - 1 of a fresh process group.

        Returns:
            What each rank returned, in rank order.

        Raises:
            WorkerError: a rank raised or did not answer in time.
        """
        self._grow(world_size)
        self.tasks += 1  # every task has its own part of the store
        for _, connection in self.workers[:world_size]:
            connection.send((world_size, self.store.port, self.tasks, function, args))
        outcomes = [self._receive(rank) for rank in range(world_size)]
        failures = [f"rank {rank}:\n{value}" for rank, (good, value) in enumerate(outcomes) if not good]
        if failures:
            # Ranks that wait for the failed one in a collective cannot run the next task.
            self.kill_workers()
            raise WorkerError("\n".join(failures))
        return [value for _, value in outcomes]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        _, connection = self.workers[rank]
        try:
            if connection.poll(TIMEOUT):
                return connection.recv()
            return False, f"no answer in {TIMEOUT:.0f} s"
        except EOFError:
            return False, "the process died"

    def kill_workers(self) -> None:
        """Ends the workers, and the processes that Megatron's checkpoint writer started in them."""
        killed = []
        for worker, connection in self.workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                killed += [*worker.children(recursive=True), worker]
            connection.close()
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.workers = []

    def close(self) -> None:
        """Ends all processes of the pool."""
        self.kill_workers()
        if "_first" in vars(self):
            self._first[0].kill()
            self._first[0].join()
            del self._first


class Pools(dict[str, WorkerPool]):
    """The pools of the session, by kind. Each starts when a test first needs it."""

    def __missing__(self, kind: str) -> WorkerPool:
        self[kind] = WorkerPool(kind)
        return self[kind]


class Collectives(TorchDispatchMode):
    """Counts the collectives called inside a `with` block, with those of the backward pass and of Megatron."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket._qualified_op_name.removeprefix("c10d::").strip("_")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def free_environment() -> dict[str, str]:
    """The environment for a program under test: this one without a launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launcher}
