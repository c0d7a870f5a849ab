"""The arithmetic of the head: slabs of whole pairs, from hidden states to the loss and both gradients.

Sums and gradients are fp32 (fp64 for fp64 weights) over all slabs, whatever the processor. A GEMM of bf16 matrices whose result
cannot be fp32 (a CPU; CUDA before torch 2.8) runs a tile of the vocabulary at a time, and each tile's result is added to the
fp32 gradient. So no product of the size of the weight is ever held, and each is rounded to bf16 once. A CPU without bf16
arithmetic casts each tile of the weight to fp32: several times faster than torch's emulation, and more exact.
Shapes: see `layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.compat import have_fp32_accumulating_addmm, have_native_bf16
from simpo_megatron.head.kernels import row_statistics, write_gradient_
from simpo_megatron.head.logprobs import join_shards, shard_targets
from simpo_megatron.head.task import HeadTask
from simpo_megatron.parallel.context import round_up

_TILE_BYTES = 32 * 2**20  # of the weight in fp32


@dataclass
class Gradients:
    """Where the gradients of one pass go, multiplied by `factor`; None where nobody asks."""

    hidden_RH: Tensor | None
    weight_VH: Tensor | None
    factor: float

    @classmethod
    def of(
        cls, hidden_RH: Tensor | None, weight_VH: Tensor | None, main_grad: Tensor | None, factor: float
    ) -> Gradients:
        """Accumulators for a pass; the weight's is `main_grad` where there is one."""
        hidden = weight = None
        if hidden_RH is not None:
            hidden = torch.empty(hidden_RH.shape, dtype=_accumulate(hidden_RH.dtype), device=hidden_RH.device)
        if weight_VH is not None and main_grad is None:
            weight = torch.zeros(weight_VH.shape, dtype=_accumulate(weight_VH.dtype), device=weight_VH.device)
        return cls(hidden, weight if main_grad is None else main_grad, factor)


def score_slabs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    task: HeadTask,
    gradients: Gradients | None,
    slab_bytes: int,
    tensor_group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the sums of a task, and its gradients into `gradients`.

    Collectives: see `layer.LogProbHead`.

    Args:
        hidden_RH: the scored tokens' hidden states.
        weight_VH: this rank's shard, padding included.
        gradients: None to compute none.

    Returns:
        loss: scalar; sums_PM: the log-probs of each response, summed over all context-parallel ranks.
    """
    scored = task.scored
    columns, local_R = shard_targets(scored.targets_R, task.vocab_size, weight_VH.shape[0], tensor_group)
    projection = _Projection(weight_VH[:columns], gradients)
    pairs, responses = len(scored.per_pair), task.responses
    dtype = _accumulate(weight_VH.dtype)
    sums_PM = torch.zeros(pairs, responses, dtype=dtype, device=weight_VH.device)
    # Sized by the padded shard, which is equal on all tensor-parallel ranks, so that all cut the same slabs.
    slab_positions = max(1, slab_bytes // (weight_VH.shape[0] * projection.dtype.itemsize))
    slabs = cut_slabs(scored.per_pair, scored.per_pair_max, slab_positions)
    longest = max((part.stop - part.start for slab in slabs for part in slab.parts), default=0)
    # The stride of the logits is a multiple of 64 numbers whatever the vocabulary: tensor cores and wide loads need it.
    logits_NV = torch.empty(longest, round_up(columns, 64), dtype=projection.dtype, device=weight_VH.device)[
        :, :columns
    ]

    def statistics(part: slice) -> tuple[Tensor, Tensor]:
        logits = logits_NV[: part.stop - part.start]
        projection.logits(hidden_RH[part], logits)
        return row_statistics(logits, local_R[part])

    for slab in slabs:
        whole = slice(slab.parts[0].start, slab.parts[-1].stop)
        lses, logps = [], []
        for part in slab.parts:
            if part.stop > part.start:  # under context parallelism a pair may have all its positions elsewhere
                lse_N, target_N = join_shards(*statistics(part), tensor_group)
                lses.append(lse_N)
                logps.append(target_N - lse_N)
        logps_N = torch.cat(logps) if logps else sums_PM.new_zeros(0)
        if __debug__:
            torch.ops.aten._assert_async.msg(~(logps_N > 0).any(), "a log-probability is positive")
        sums_S = sums_PM.new_zeros(pairs * responses).index_add_(0, scored.segments_R[whole], logps_N)
        sums_PM[slab.pairs] = sums_S.view_as(sums_PM)[slab.pairs]
        if _spans(context_group):
            dist.all_reduce(sums_PM[slab.pairs], group=context_group)
        if gradients is None or not logps:
            continue
        coefficients_N = _derivative(task, sums_PM).index_select(0, scored.segments_R[whole]) * gradients.factor
        lse_N = torch.cat(lses)
        for part in reversed(slab.parts):  # the logits of the last part are still there
            logits = logits_NV[: part.stop - part.start]
            if part is not slab.parts[-1]:
                projection.logits(hidden_RH[part], logits)
            here = slice(part.start - whole.start, part.stop - whole.start)
            write_gradient_(logits, local_R[part], lse_N[here], coefficients_N[here])
            projection.gradients(logits, hidden_RH, part)
    return task.loss(sums_PM), sums_PM


@dataclass(frozen=True)
class Slab:
    """Whole pairs whose logits are held together.

    Attributes:
        pairs: which.
        parts: their scored positions; several parts for one pair that is larger than a slab.
    """

    pairs: slice
    parts: tuple[slice, ...]


def cut_slabs(per_pair: Sequence[int], per_pair_max: Sequence[int], slab_positions: int) -> list[Slab]:
    """Cuts a microbatch into slabs of at most `slab_positions` scored positions.

    Args:
        per_pair: scored positions of each pair on this rank.
        per_pair_max: the same on the context-parallel rank that has most of them; the cut follows it, so that all ranks
            cut alike.
        slab_positions: of a slab.

    >>> [(s.pairs, s.parts) for s in cut_slabs([2, 3, 9, 1], [2, 3, 9, 1], 5)]  # doctest: +NORMALIZE_WHITESPACE
    [(slice(0, 2, None), (slice(0, 5, None),)),
     (slice(2, 3, None), (slice(5, 10, None), slice(10, 14, None))),
     (slice(3, 4, None), (slice(14, 15, None),))]
    """
    slabs, first, held = [], 0, 0
    for pair, count in enumerate([*per_pair_max, slab_positions + 1]):
        if held + count > slab_positions and pair > first:
            start = sum(per_pair[:first])
            stop = start + sum(per_pair[first:pair])
            size = max(1, min(slab_positions, stop - start))
            parts = tuple(slice(at, min(at + size, stop)) for at in range(start, max(stop, start + 1), size))
            slabs.append(Slab(slice(first, pair), parts))
            first, held = pair, 0
        held += count
    return slabs


class _Projection:
    """Logits of some positions, and the two gradients from the logits' gradient, a tile of the vocabulary at a time."""

    def __init__(self, weight_VH: Tensor, into: Gradients | None) -> None:
        self.weight, self.into, (columns, hidden) = weight_VH, into, weight_VH.shape
        rounds = weight_VH.dtype == torch.bfloat16 and not (weight_VH.is_cuda and have_fp32_accumulating_addmm())
        emulated = rounds and not (weight_VH.is_cuda or have_native_bf16())
        self.dtype = torch.float32 if emulated else weight_VH.dtype
        size = max(1, min(_TILE_BYTES // (4 * hidden), columns)) if rounds else max(1, columns)
        self.tiles = [slice(start, min(start + size, columns)) for start in range(0, columns, size)]
        self.cast = torch.empty(size if emulated else 0, hidden, dtype=self.dtype, device=weight_VH.device)

    def _tile(self, tile: slice) -> Tensor:
        weight = self.weight[tile]
        return weight if weight.dtype == self.dtype else self.cast[: len(weight)].copy_(weight)

    def logits(self, hidden_NH: Tensor, out_NV: Tensor) -> None:
        """Writes the logits of some positions."""
        hidden_NH = hidden_NH.to(self.dtype)
        for tile in self.tiles:
            _multiply(out_NV[:, tile], hidden_NH, self._tile(tile).t(), add=False)

    def gradients(self, grad_NV: Tensor, hidden_RH: Tensor, part: slice) -> None:
        """Writes the gradient of the hidden states of some positions and adds to that of the weight."""
        assert self.into is not None
        grad_hidden, grad_weight = self.into.hidden_RH, self.into.weight_VH
        hidden_NH = hidden_RH[part].to(self.dtype)
        if grad_hidden is not None and not self.tiles:
            grad_hidden[part] = 0
        for tile in self.tiles:
            if grad_hidden is not None:
                _multiply(grad_hidden[part], grad_NV[:, tile], self._tile(tile), add=tile.start > 0)
            if grad_weight is not None:
                _multiply(grad_weight[tile], grad_NV[:, tile].t(), hidden_NH, add=True)


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b, in the precision of `out` where the device can."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif out.is_cuda and have_fp32_accumulating_addmm():
        torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)
    elif add:
        out.add_(a @ b)
    else:
        out.copy_(a @ b)


def _derivative(task: HeadTask, sums_PM: Tensor) -> Tensor:
    """Derivative of the loss by the sum of each sequence, [P * M]; right for the pairs whose sums are known."""
    with torch.enable_grad():
        known_PM = sums_PM.detach().clone().requires_grad_()
        (grad_PM,) = torch.autograd.grad(task.loss(known_PM), known_PM)
    return grad_PM.flatten()


def _spans(group: dist.ProcessGroup | None) -> bool:
    return group is not None and group.size() > 1


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
