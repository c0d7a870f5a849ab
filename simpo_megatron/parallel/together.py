"""An error of one rank becomes an error of all ranks, so that none waits in a collective for a rank that stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from simpo_megatron.errors import UserError


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raises a UserError on every rank where the block raises one on any rank: that of the lowest such rank.

    Collectives: one all-gather of a string at the end of the block. The block itself must contain no collective that a
    failing rank would miss.

    Raises:
        UserError: see above.
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
