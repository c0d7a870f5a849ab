"""Known mistakes, planted into a running rank. `tests/verify` and `test_layouts.py` must see each of them.

    with planted("mean of means"):
        ...                              # this process computes with the mistake

`PLANTED` lists the mistakes, each with a number of ranks and a layout in which it shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def shift_after_slicing(batch: Any) -> Any:
    """Targets that are shifted on this rank's slices: the last token of a slice scores the token behind the gap."""
    tokens = batch.tokens[0]
    shifted = torch.cat((tokens[1:], tokens[:1]))
    return replace(batch, scored=replace(batch.scored, targets_R=shifted[batch.scored.positions_R]))


def plain_all_reduce(logits_NV: Tensor, targets_N: Tensor, vocab_size: int, group: Any) -> Tensor:
    """Vocab-parallel log-probs with the right value and a wrong gradient: autograd does not see the all-reduces."""
    start = group.rank() * logits_NV.shape[1]
    columns = max(0, min(vocab_size - start, logits_NV.shape[1]))
    logits_NV = logits_NV[:, :columns].float()
    largest_N = logits_NV.detach().amax(1)
    dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
    total_N = (logits_NV - largest_N[:, None]).exp().sum(1)
    dist.all_reduce(total_N, group=group)
    local_N = targets_N - start
    owned_N = (local_N >= 0) & (local_N < columns)
    picked_N = logits_NV.gather(1, local_N.where(owned_N, 0)[:, None])[:, 0] - largest_N
    logps_N = (picked_N - total_N.log()) * owned_N
    dist.all_reduce(logps_N, group=group)
    return logps_N


@contextlib.contextmanager
def planted(mistake: str) -> Iterator[None]:
    """Makes this process compute with the mistake."""
    from simpo_megatron import step
    from simpo_megatron.batch import packer
    from simpo_megatron.head import layer

    names: list[tuple[Any, str, Any]] = {
        "labels shifted after slicing": [
            (packer, "pack_row", lambda *a, _f=packer.pack_row, **k: shift_after_slicing(_f(*a, **k)))
        ],
        "plain all-reduce": [(step, "vocab_parallel_logprobs", plain_all_reduce)],
        "hidden gradient not reduced": [(layer, "_reduce", lambda grad_TH, _head: grad_TH)],
        "mean of means": [
            (step, "batch_loss", lambda *a, _f=step.batch_loss: _mean_of_means(_f, *a)),
            (step, "batch_slopes", lambda *a, _f=step.batch_slopes: _mean_of_means(_f, *a)),
        ],
        "context factor dropped": [(step, "sum_over_context", _without_context_factor)],
    }[mistake]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in names]
    try:
        for owner, name, value in names:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _mean_of_means(share_of_loss: Any, objective: Any, batch: Any, sums_PM: Tensor) -> Any:
    """Every microbatch divides by its own number of pairs, and the schedule by microbatches and ranks."""
    from megatron.core import parallel_state

    rows = 3  # of the test's batch
    share = max(1, len(batch.weight)) * max(rows, parallel_state.get_data_parallel_world_size())
    return share_of_loss(objective, batch, sums_PM) * batch.counts.pairs / share


def _without_context_factor(sums_PM: Tensor) -> Tensor:
    """The gradient of the summed log-probs is divided by CP once more than it should be."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    size = parallel_state.get_context_parallel_world_size()
    whole: Any = reduce_from_tensor_model_parallel_region(sums_PM, parallel_state.get_context_parallel_group())
    return whole.detach() + (whole - whole.detach()) / size


PLANTED: dict[str, tuple[int, dict[str, Any]]] = {
    "labels shifted after slicing": (2, {"context_parallel_size": 2}),
    "plain all-reduce": (2, {"tensor_model_parallel_size": 2, "head": "plain"}),
    "hidden gradient not reduced": (2, {"tensor_model_parallel_size": 2}),
    "mean of means": (2, {}),
    "context factor dropped": (2, {"context_parallel_size": 2, "head": "plain"}),
}
