"""Ranks that fail together: an error of one rank is raised on all, so that none waits in a collective for one that left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from simpo_megatron.errors import UserError


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Turns a UserError of any rank inside the block into the same UserError on every rank.

    Collectives: one all-gather of a string at the end of the block. The block itself must not hold collectives that a
    failing rank would miss.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    first = next((text for text in messages if text), None)
    if first:
        raise UserError(first)
