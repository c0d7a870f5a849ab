"""The pass of the head: slab after slab from hidden states to log-probs, and back to both gradients.

A slab is a buffer of logits for some scored positions. It holds whole pairs, as many as fit. A pair that is larger than
a slab goes through it in several parts: all parts are scored first, then their gradients are computed in reverse order.
`layer.py` says why a pass can do this, and what it costs.

Shapes: R scored positions of this context-parallel rank, N some of them, H hidden, V columns of this tensor-parallel
rank, P pairs, M scored responses of a pair, S = P * M responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.head.kernels import row_statistics, write_gradient_
from simpo_megatron.head.logprobs import join_shards, shard_targets
from simpo_megatron.head.projection import Gradients, Projection, accumulator
from simpo_megatron.head.segments import segment_sums
from simpo_megatron.head.task import HeadTask
from simpo_megatron.parallel.context import round_up

# A log-prob above it is a mistake. The log-sum-exp of fp32 kernels may lie this far below the target's logit.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Slab:
    """Some pairs that are scored at once.

    Attributes:
        pairs: which pairs.
        parts: their scored positions. There are several parts only if the slab holds one pair that is too large for it.
    """

    pairs: slice
    parts: tuple[slice, ...]

    @property
    def positions(self) -> slice:
        """The scored positions of all parts."""
        return slice(self.parts[0].start, self.parts[-1].stop)


@dataclass(frozen=True)
class Groups:
    """The ranks that share a pass.

    Attributes:
        tensor: those that hold the other shards of the output layer; None for one rank.
        context: those that hold the other positions of the pairs; None for one rank.
    """

    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None


def cut_slabs(per_pair: Sequence[int], per_pair_max: Sequence[int], slab_positions: int) -> list[Slab]:
    """Cuts the pairs of a microbatch into slabs.

    Args:
        per_pair: scored positions of each pair on this rank.
        per_pair_max: the same on the context-parallel rank that has most of the pair. It decides which pairs share a
            slab, so that all ranks cut alike.
        slab_positions: the most positions of a slab.

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


def score_slabs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    task: HeadTask,
    gradients: Gradients | None,
    slab_bytes: int,
    groups: Groups,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a pass: the loss and the sums of a task, and its gradients if they are needed.

    Collectives: see `layer.LogProbHead`.

    Args:
        hidden_RH: the hidden states of the scored positions.
        weight_VH: this rank's shard of the output layer, padding included.
        task: what is scored.
        gradients: where the gradients go; None if they are not needed.
        slab_bytes: bytes of a slab; it holds one position at least.
        groups: the ranks that share the pass.
        softcap: the bound of the model's logits (`kernels.soft_cap`); None for none.

    Returns:
        The loss, a scalar; and the summed log-probs of each response over all context-parallel ranks, [P, M].
    """
    found = _Pass(hidden_RH, weight_VH, task, gradients, slab_bytes, groups, softcap)
    for slab in found.slabs:
        lse_N = found.score(slab)
        if gradients is not None and lse_N is not None:
            found.differentiate(slab, lse_N, gradients.factor)
    return task.loss(found.sums_PM), found.sums_PM


class _Pass:
    """The state of one pass; arguments as for `score_slabs`.

    Attributes:
        slabs: the slabs, in the order of the pairs.
        sums_PM: the summed log-probs of the pairs that are scored already, 0 for the others.
        logits_NV: the buffer that every slab uses.
        targets_R: the column of each position's target, -1 where another rank holds it.
    """

    def __init__(
        self,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        task: HeadTask,
        gradients: Gradients | None,
        slab_bytes: int,
        groups: Groups,
        softcap: float | None,
    ) -> None:
        scored, device = task.scored, weight_VH.device
        columns, self.targets_R = shard_targets(scored.targets_R, task.vocab_size, weight_VH.shape[0], groups.tensor)
        self.hidden_RH, self.task, self.softcap = hidden_RH, task, softcap
        self.groups = groups
        self.projection = Projection(weight_VH[:columns], gradients)
        self.sums_PM = torch.zeros(
            len(scored.per_pair), task.responses, dtype=accumulator(weight_VH.dtype), device=device
        )
        # Sized by the padded shard, which is equal on all tensor-parallel ranks, so that all cut the same slabs.
        slab_positions = max(1, slab_bytes // (weight_VH.shape[0] * self.projection.dtype.itemsize))
        self.slabs = cut_slabs(scored.per_pair, scored.per_pair_max, slab_positions)
        longest = max((part.stop - part.start for slab in self.slabs for part in slab.parts), default=0)
        # The stride of a row is a multiple of 64 numbers whatever the vocabulary: tensor cores and wide loads need it.
        buffer = torch.empty(longest, round_up(columns, 64), dtype=self.projection.dtype, device=device)
        self.logits_NV = buffer[:, :columns]

    def score(self, slab: Slab) -> Tensor | None:
        """Fills in the sums of a slab's pairs.

        Returns:
            The log-sum-exp of each position, [N]; None if this rank has no position of these pairs.
        """
        lses, logps = [], []
        for part in slab.parts:
            if part.stop > part.start:  # else all positions of the pair lie on other context-parallel ranks
                statistics = row_statistics(self._project(part), self.targets_R[part], self.softcap)
                lse_N, target_N = join_shards(*statistics, self.groups.tensor)
                lses.append(lse_N)
                logps.append(target_N - lse_N)
        logps_N = torch.cat(logps) if logps else self.sums_PM.new_zeros(0)
        if __debug__:
            torch.ops.aten._assert_async.msg(~(logps_N > _ROUNDING).any(), "a log-probability is positive")
        here_PM = self.sums_PM[slab.pairs]
        segments_N = self.task.scored.segments_R[slab.positions] - slab.pairs.start * self.task.responses
        here_PM.copy_(segment_sums(logps_N, segments_N, here_PM.numel()).view_as(here_PM))
        context = self.groups.context
        if context is not None and context.size() > 1:
            dist.all_reduce(here_PM, group=context)
        return torch.cat(lses) if lses else None

    def differentiate(self, slab: Slab, lse_N: Tensor, factor: float) -> None:
        """Computes the gradients of a slab that was just scored, multiplied by `factor`; `lse_N` is from `score`."""
        start, segments_N = slab.positions.start, self.task.scored.segments_R[slab.positions]
        # The slopes are right for the pairs that are scored already: the loss of a pair does not depend on the sums of
        # other pairs.
        coefficients_N = self.task.slopes_of(self.sums_PM).flatten().index_select(0, segments_N) * factor
        for part in reversed(slab.parts):
            # The buffer still holds the logits of the last part. Those of earlier parts are computed again.
            last = part is slab.parts[-1]
            logits_NV = self._logits(part) if last else self._project(part)
            here = slice(part.start - start, part.stop - start)
            write_gradient_(logits_NV, self.targets_R[part], lse_N[here], coefficients_N[here], self.softcap)
            self.projection.add_gradients(logits_NV, self.hidden_RH, part)

    def _logits(self, part: slice) -> Tensor:
        """The rows of the buffer that a part takes."""
        return self.logits_NV[: part.stop - part.start]

    def _project(self, part: slice) -> Tensor:
        """Computes the logits of a part, in the buffer."""
        logits_NV = self._logits(part)
        self.projection.logits(self.hidden_RH[part], logits_NV)
        return logits_NV
