"""What the ranks agree on after each row, through the store by which the processes met.

A rank that raised closes its process groups (`announce_crash`): over gloo the ranks that wait for it raise at once, and
all meet in `agree`. Then `restart` makes new groups.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from simpo_megatron.parallel.together import forget_host_group


class NoAnswer(Exception):
    """A rank did not answer in time, or has ended."""


class Ranks:
    """The processes of the test. Every rank makes it at the same time, where `torch.distributed` is initialised.

    Args:
        timeout: how long a rank may take for a row after the first rank has finished it.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self.rank, self.size, self._backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        self._store: Any = dist.distributed_c10d._get_default_store()
        # A second connection, for the thread that watches: the main thread may wait for the store with the first.
        self._watched = self._store.clone() if hasattr(self._store, "clone") else self._store
        self._restarts = self._rows = 0

    def agree(self, mine: Any) -> list[Any]:
        """What every rank says, in rank order. It needs no process group.

        Raises:
            NoAnswer: see there.
        """
        self._rows += 1
        said, read = (
            [f"self_test/{self._rows}/{kind}/{rank}" for rank in range(self.size)] for kind in ("said", "read")
        )
        try:
            self._store.set(said[self.rank], pickle.dumps(mine))
            self._store.wait(said, self.timeout)
            answers = [pickle.loads(self._store.get(key)) for key in said]
            self._store.set(read[self.rank], "")
            if self.rank == 0:  # its process may hold the store, and end after the last row
                self._store.wait(read, self.timeout)
        except (RuntimeError, dist.DistError) as error:
            raise NoAnswer(" ".join(str(error).split())[:200]) from error
        return answers

    def announce_crash(self, text: str) -> None:
        """Lets the other ranks know that this one has raised, before they answer, and leaves their collectives.

        Of several crashes the first is told: the others may be of ranks that were left.
        """
        self._store.compare_set(self._crash_key, "", text)
        if self._backend == "gloo":  # NCCL would not tell the others
            self._close()

    def crash(self) -> str | None:
        """The error of a rank that has raised since the last restart; any thread may call it."""
        try:
            return self._watched.get(self._crash_key).decode() if self._watched.check([self._crash_key]) else None
        except (RuntimeError, dist.DistError) as error:  # the process that holds the store has ended
            return f"the ranks have lost each other: {' '.join(str(error).split())[:200]}"

    @property
    def _crash_key(self) -> str:
        return f"self_test/crash/{self._restarts}"

    def _close(self) -> None:
        """Destroys all process groups. gloo closes the connections of those that nothing refers to."""
        with contextlib.suppress(Exception):  # a group that is out of step may refuse
            parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        forget_host_group()
        gc.collect()

    def restart(self) -> None:
        """Replaces all process groups by new ones. Every rank calls it.

        Raises:
            NoAnswer: see there.
        """
        self._restarts += 1
        try:
            self._close()
            store = dist.PrefixStore(f"self_test/{self._restarts}", self._store)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(
                self._backend, store=store, rank=self.rank, world_size=self.size, timeout=self.timeout
            )
        except (RuntimeError, dist.DistError) as error:
            raise NoAnswer(" ".join(str(error).split())[:200]) from error


def leave_layout() -> None:
    """Destroys the process groups of a layout, and leaves those of the whole program."""
    groups = [group for group in getattr(parallel_state, "_global_process_group_list", None) or () if group]
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    for group in groups:
        with contextlib.suppress(ValueError, RuntimeError, AssertionError):  # it is in two places of the list
            dist.destroy_process_group(group)
