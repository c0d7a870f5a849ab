"""Token log-probs from vocabulary-sharded logits: the plain form, which everything faster is compared with.

Shapes: N tokens, V vocabulary columns of this tensor-parallel rank, G tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Rows are cast to fp32 in blocks of this many bytes, so that all the logits of a bf16 model are never held in fp32.
_BLOCK_BYTES = 64 * 2**20


def shard_targets(
    targets_N: Tensor, vocab_size: int, shard_size: int, group: dist.ProcessGroup | None
) -> tuple[int, Tensor]:
    """What this rank's shard of `shard_size` columns holds of the vocabulary and of the targets.

    Args:
        targets_N: token ids in the whole vocabulary.
        vocab_size: the true vocabulary.
        shard_size: columns of every shard; the last ones pad the vocabulary to a multiple of the ranks.
        group: the tensor-parallel group; None for one process.

    Returns:
        The number of real columns in this shard, and the column of each target, -1 where another rank holds it.
    """
    start = 0 if group is None else group.rank() * shard_size
    columns = min(max(vocab_size - start, 0), shard_size)
    local_N = targets_N - start
    return columns, local_N.where((local_N >= 0) & (local_N < columns), -1)


def join_shards(lse_N: Tensor, target_N: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The log-sum-exp over the columns of all ranks, and the target's logit.

    Collectives: one all-gather of two numbers a token; none for one rank.

    Args:
        lse_N: log-sum-exp over this rank's columns.
        target_N: the target's logit; 0 where another rank holds it.
        group: the tensor-parallel group; None for one process.
    """
    if group is None or group.size() == 1:
        return lse_N, target_N
    stats_2N = torch.stack((lse_N, target_N))
    gathered_G2N = stats_2N.new_empty(group.size(), *stats_2N.shape)
    dist.all_gather_into_tensor(gathered_G2N.flatten(0, 1), stats_2N, group=group)
    return torch.logsumexp(gathered_G2N[:, 0], dim=0), gathered_G2N[:, 1].sum(0)


def _blocks(logits_NV: Tensor) -> list[slice]:
    """Blocks of rows of about `_BLOCK_BYTES` in fp32."""
    rows = max(1, _BLOCK_BYTES // (4 * max(1, logits_NV.shape[1])))
    return [slice(start, start + rows) for start in range(0, logits_NV.shape[0], rows)]


class _VocabParallelLogProbs(torch.autograd.Function):
    """The autograd function of `vocab_parallel_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, vocab_size: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        columns, local_N = shard_targets(targets_N, vocab_size, logits_NV.shape[1], group)
        owned_N = local_N >= 0
        local_N = local_N.clamp(min=0)

        accumulate = torch.promote_types(logits_NV.dtype, torch.float32)
        lse_N = torch.empty(targets_N.shape, dtype=accumulate, device=logits_NV.device)
        for rows in _blocks(logits_NV):
            lse_N[rows] = torch.logsumexp(logits_NV[rows, :columns].to(accumulate), dim=-1)
        target_N = logits_NV.gather(1, local_N[:, None])[:, 0].to(accumulate) * owned_N

        lse_N, target_N = join_shards(lse_N, target_N, group)
        ctx.save_for_backward(logits_NV, lse_N, local_N, owned_N)
        ctx.columns = columns
        return target_N - lse_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, lse_N, local_N, owned_N = ctx.saved_tensors
        (grad_N,) = grads
        grad_NV = torch.zeros_like(logits_NV)
        for rows in _blocks(logits_NV):
            # d log p(target) / d logit_v = [v is the target] - softmax_v
            block = (logits_NV[rows, : ctx.columns].to(lse_N.dtype) - lse_N[rows, None]).exp_()
            block.mul_(-grad_N[rows, None])
            if ctx.columns:
                block.scatter_add_(1, local_N[rows, None], (grad_N * owned_N)[rows, None])
            grad_NV[rows, : ctx.columns] = block
        return grad_NV, None, None, None


def vocab_parallel_logprobs(
    logits_NV: Tensor, targets_N: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The log-prob of each row's target, over the vocabulary whose shards the ranks of `group` hold.

    Every rank gets the gradient of the unsharded log-softmax for its own columns.

    Collectives over `group`: one all-gather of two numbers a token in the forward pass, none in the backward pass; none
    at all for one rank.

    Args:
        logits_NV: this rank's columns [N, V], any floating dtype. Shards have equal sizes and stand in rank order. Sums
            are fp32 (fp64 for fp64 logits).
        targets_N: token ids in the whole vocabulary, int64, each below `vocab_size`.
        vocab_size: the true vocabulary; columns from there on are padding and get neither probability nor gradient.
        group: the tensor-parallel group; None for one process.

    Returns:
        [N] fp32 (fp64 for fp64 logits), each at most 0.
    """
    return _VocabParallelLogProbs.apply(logits_NV, targets_N, vocab_size, group)  # type: ignore[no-any-return]
