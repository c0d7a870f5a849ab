"""Causal attention block by block, where no fused one will do: masks of a part of the queries, and capped scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simpo_megatron.models.additions import CAPPED_BLOCK

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


class Capped(NamedTuple):
    """What a capped attention computes.

    Attributes:
        at: position of the first query.
        window: keys that a query attends to at most, itself included; None for all.
        scale: the factor of the scores.
        softcap: their bound.
    """

    at: int
    window: int | None
    scale: float
    softcap: float


class CappedAttention(torch.autograd.Function):
    """Causal attention with scores that are bounded by `softcap * tanh(score / softcap)`, before the mask.

    Torch's fused attention has no such bound. Scores are made a block at a time, and again in the backward pass, so
    that of a layer only queries, keys and values are kept. Products are in the dtype of the inputs, scores and
    probabilities in fp32 (fp64 for fp64), as in transformers' eager attention.

    Shapes: B sequences, H query heads, G key heads, R = H / G, n queries, b of a block, m its keys, D width of a head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: Capped) -> Tensor:
        """Attention of q [B, H, n, D] to k and v [B, G, at + n, D], in the shape of q."""
        ctx.save_for_backward(q, k, v)
        ctx.how = how
        out = torch.empty_like(q)
        for block, q_b, _, p in CappedAttention._probabilities(ctx.how, q, k):
            out[:, :, block.queries] = _ungrouped(p.to(q.dtype) @ v[:, :, block.keys], q_b)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of q, k and v."""
        q, k, v = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, q_b, tanh, p in CappedAttention._probabilities(ctx.how, q, k):
            above = _grouped(grads[0][:, :, block.queries], k.shape[1])
            of_v[:, :, block.keys] += p.to(q.dtype).mT @ above
            of_p = (above @ v[:, :, block.keys].mT).to(p.dtype)
            of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * (1 - tanh.square()) * ctx.how.scale
            of_scores = of_scores.to(q.dtype)
            of_q[:, :, block.queries] = _ungrouped(of_scores @ k[:, :, block.keys], q_b)
            of_k[:, :, block.keys] += of_scores.mT @ _grouped(q_b, k.shape[1])
        return of_q, of_k, of_v, None

    @staticmethod
    def _probabilities(how: Capped, q: Tensor, k: Tensor) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
        """Yields every block with its queries [B, H, b, D], tanh of its scores and probabilities [B, G, R * b, m]."""
        groups, size = k.shape[1], min(how.window or CAPPED_BLOCK, CAPPED_BLOCK)
        for block in blocks_of(q.shape[2], how.at, how.window, size, q.device):
            q_b = q[:, :, block.queries]
            scores = _grouped(q_b, groups) @ k[:, :, block.keys].mT
            scores = scores.to(torch.promote_types(q.dtype, torch.float32))
            tanh = torch.tanh(scores * (how.scale / how.softcap))
            hidden = ~block.mask.repeat(q.shape[1] // groups, 1)
            yield block, q_b, tanh, (how.softcap * tanh).masked_fill(hidden, -torch.inf).softmax(-1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, H, b, D] -> [B, G, R * b, D]: the rows of the query heads that share a key head."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def _ungrouped(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_grouped`."""
    return x.reshape(like.shape)
