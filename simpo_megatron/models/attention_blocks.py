"""Causal attention block by block, where no fused one will do: masks of a part of the queries, capped scores, sinks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simpo_megatron.models.additions import SCORES_BLOCK

BLOCK = 1024  # queries that share one explicit mask


class Block(NamedTuple):
    """Some queries, the keys that any of them attends to, and which of them each attends to, [queries, keys]."""

    queries: slice
    keys: slice
    mask: Tensor


def blocks_of(n: int, at: int, window: int | None, size: int, device: torch.device) -> Iterator[Block]:
    """Cuts n queries at the positions from `at` on into blocks, so that no mask covers all queries and keys.

    Under a window the time of all blocks is linear in n.
    """
    for start in range(0, n, size):
        stop = min(start + size, n)
        first = max(0, at + start - window + 1) if window else 0
        of_query = torch.arange(at + start, at + stop, device=device)
        distance = of_query[:, None] - torch.arange(first, at + stop, device=device)
        mask = (distance >= 0) & (distance < window) if window else distance >= 0
        yield Block(slice(start, stop), slice(first, at + stop), mask)


class Scores(NamedTuple):
    """How scores are computed and masked.

    Attributes:
        at: position of the first query.
        window: keys that a query attends to at most, itself included; None for all.
        scale: the factor of the products.
        softcap: their bound; None for none.
    """

    at: int
    window: int | None
    scale: float
    softcap: float | None


class BlockAttention(torch.autograd.Function):
    """Causal attention with scores that are capped by `softcap * tanh(score / softcap)`, and with sinks.

    The cap comes before the mask. A sink is a score of each query head that belongs to no key: every query shares its
    probabilities with it. Torch's fused attention has neither. Scores are made a block at a time, and again in the
    backward pass, so that of a layer only queries, keys and values are kept. Products are in the dtype of the inputs,
    scores and probabilities in fp32 (fp64 for fp64), as in transformers' eager attention.

    Shapes: B sequences, H query heads, G key heads, R = H / G, n queries, b of a block, m its keys, D width of a head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Scores) -> Tensor:
        """Attention of q [B, H, n, D] to k and v [B, G, at + n, D], in the shape of q; sinks [H]."""
        ctx.save_for_backward(q, k, v, sinks)
        ctx.how = how
        out = torch.empty_like(q)
        for block, q_b, _, p, _ in BlockAttention._probabilities(ctx.how, q, k, sinks):
            out[:, :, block.queries] = _ungrouped(p.to(q.dtype) @ v[:, :, block.keys], q_b)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of q, k, v and the sinks."""
        q, k, v, sinks = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        of_sinks = q.new_zeros(q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
        for block, q_b, slope, p, p_sink in BlockAttention._probabilities(ctx.how, q, k, sinks):
            above = _grouped(grads[0][:, :, block.queries], k.shape[1])
            of_v[:, :, block.keys] += p.to(q.dtype).mT @ above
            of_p = (above @ v[:, :, block.keys].mT).to(p.dtype)
            mean = (of_p * p).sum(-1, keepdim=True)
            of_scores = (p * (of_p - mean) * slope * ctx.how.scale).to(q.dtype)
            of_q[:, :, block.queries] = _ungrouped(of_scores @ k[:, :, block.keys], q_b)
            of_k[:, :, block.keys] += of_scores.mT @ _grouped(q_b, k.shape[1])
            if sinks is not None:
                of_sinks -= (p_sink * mean).unflatten(2, (-1, q_b.shape[2])).sum((0, 3, 4)).flatten()
        return of_q, of_k, of_v, None if sinks is None else of_sinks.to(sinks.dtype), None

    @staticmethod
    def _probabilities(
        how: Scores, q: Tensor, k: Tensor, sinks: Tensor | None
    ) -> Iterator[tuple[Block, Tensor, Tensor | float, Tensor, Tensor]]:
        """Goes over the blocks.

        Yields:
            The block; its queries [B, H, b, D]; the derivative of its scores by the scaled products; its probabilities
            [B, G, R * b, m]; and those of the sinks [B, G, R * b, 1], or an empty tensor.
        """
        groups, size = k.shape[1], min(how.window or SCORES_BLOCK, SCORES_BLOCK)
        for block in blocks_of(q.shape[2], how.at, how.window, size, q.device):
            q_b = q[:, :, block.queries]
            scores = _grouped(q_b, groups) @ k[:, :, block.keys].mT
            scores, slope = scores.to(torch.promote_types(q.dtype, torch.float32)) * how.scale, 1.0
            if how.softcap is not None:
                tanh = torch.tanh(scores / how.softcap)
                scores, slope = how.softcap * tanh, 1 - tanh.square()
            hidden = ~block.mask.repeat(q.shape[1] // groups, 1)
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                of_rows = sinks.view(groups, -1, 1).expand(-1, -1, q_b.shape[2]).reshape(1, groups, -1, 1)
                scores = torch.cat((scores, of_rows.to(scores.dtype).expand(len(q), -1, -1, -1)), -1)
            p = scores.softmax(-1)
            keys = block.mask.shape[1]
            yield block, q_b, slope, p[..., :keys], p[..., keys:]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, H, b, D] -> [B, G, R * b, D]: the rows of the query heads that share a key head."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def _ungrouped(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_grouped`."""
    return x.reshape(like.shape)
