"""What the ranks agree on after each row, over a gloo group of their own with a timeout.

A rank that raised cannot hang the others for good: their collectives time out, they raise too, and all meet in `agree`.
The groups of such a row may be out of step, so `restart` makes new ones.
"""

from __future__ import annotations

import contextlib
import gc
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


class NoAnswer(Exception):
    """A rank did not answer in time, or has ended."""


class Ranks:
    """The processes of the test. Every rank makes it at the same time, where `torch.distributed` is initialised.

    Args:
        timeout: how long a rank may take for a row after the first rank has finished it.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._store: Any = dist.distributed_c10d._get_default_store()
        # A second connection, for the thread that watches: the main thread may wait for the store with the first.
        self._watched = self._store.clone() if hasattr(self._store, "clone") else self._store
        self._restarts = 0
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout)

    def agree(self, mine: Any) -> list[Any]:
        """What every rank says, in rank order. Collectives: one gather of objects over gloo.

        Raises:
            NoAnswer: see there.
        """
        answers: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(answers, mine, group=self._group)
        except (RuntimeError, dist.DistError) as error:  # gloo raises both
            raise NoAnswer(" ".join(str(error).split())[:200]) from error
        return answers

    def announce_crash(self, text: str) -> None:
        """Lets the other ranks know that this one has raised, before they answer."""
        self._store.set(self._crash_key, text)

    def crash(self) -> str | None:
        """The error of a rank that has raised since the last restart; any thread may call it."""
        try:
            return self._watched.get(self._crash_key).decode() if self._watched.check([self._crash_key]) else None
        except (RuntimeError, dist.DistError) as error:  # the process that holds the store has ended
            return f"the ranks have lost each other: {' '.join(str(error).split())[:200]}"

    @property
    def _crash_key(self) -> str:
        return f"self_test/crash/{self._restarts}"

    def restart(self) -> None:
        """Replaces all process groups by new ones. Every rank calls it.

        Raises:
            NoAnswer: see there.
        """
        backend = dist.get_backend()
        self._restarts += 1
        with contextlib.suppress(Exception):  # a group that is out of step may refuse
            parallel_state.destroy_model_parallel()
        try:
            dist.destroy_process_group()
            gc.collect()
            store = dist.PrefixStore(f"self_test/{self._restarts}", self._store)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=self.timeout)
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
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
