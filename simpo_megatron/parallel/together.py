"""What all ranks do on the host: an error of one rank becomes an error of all, and waits that may take hours.

A rank that stops with an error would leave the others waiting in a collective. And while rank 0 tokenizes or loads
weights, the others wait for longer than the timeout of a collective of training. So these waits have a process group of
their own, over gloo on every device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from simpo_megatron.errors import UserError

HOST_TIMEOUT = timedelta(days=1)  # gloo notices a process that has ended at once
_host: tuple[dist.ProcessGroup, Any] | None = None  # the default group, and that of the host for it


def start_host_group() -> None:
    """Builds the group of all ranks for waits on the host. Collectives: those of `new_group`."""
    global _host
    assert dist.group.WORLD is not None
    _host = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))


def forget_host_group() -> None:
    """Lets go of the groups of `start_host_group`: gloo closes destroyed ones that nothing holds."""
    global _host
    _host = None


def host_group() -> dist.ProcessGroup | None:
    """The group of `start_host_group`; None, which means the default group, where it was not built."""
    return _host[1] if _host is not None and _host[0] is dist.group.WORLD else None


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raises a UserError on every rank where the block raises one on any rank: that of the lowest such rank.

    Collectives: one all-gather of a string at the end of the block, over the host's group. The block itself must
    contain no collective that a failing rank would miss.

    Raises:
        UserError: see above.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message, group=host_group())
    first = next((text for text in messages if text), None)
    if first:
        error = UserError(first)
        error.on_all_ranks = True
        raise error
