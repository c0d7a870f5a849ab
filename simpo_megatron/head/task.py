"""What one pass of the head is to score. No Megatron, no process group.

Shapes: R scored positions of this context-parallel rank, P pairs, M responses of a pair that are scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScoredPositions:
    """The positions of a row that score a response token; the same on all tensor-parallel ranks.

    Attributes:
        positions_R: place in the row of tokens, int64, in the order of the pairs. The last token of a shared prompt scores the
            first token of both responses and stands twice.
        targets_R: the token id each position scores, int64, in the whole vocabulary.
        segments_R: the response it belongs to, pair * M + response, int64.
        per_pair: [P] positions of each pair on this rank. Python integers, so that slabs are cut without a device sync.
        per_pair_max: [P] the same on the context-parallel rank that has most of the pair. All ranks cut slabs by it, so that
            their collectives match.
    """

    positions_R: Tensor
    targets_R: Tensor
    segments_R: Tensor
    per_pair: tuple[int, ...]
    per_pair_max: tuple[int, ...]


@dataclass(frozen=True)
class HeadTask:
    """The scoring task of one microbatch.

    Attributes:
        scored: positions and targets.
        responses: scored responses of a pair, M.
        vocab_size: the true vocabulary; columns from there on get neither probability nor gradient.
        loss: sums [P, M] of log-probs over all context-parallel ranks, fp32 (fp64 for fp64 weights) -> scalar, a sum of one
            differentiable term a pair. Called after every slab to differentiate that slab's pairs (sums not yet computed are
            0), and once at the end for the value.
        loss_gradient: the number by which the backward pass will multiply the gradient of the loss, where it is known. Then
            the gradient of the weight is added to an fp32 `main_grad` directly: no copy of it in fp32, no rounding.
    """

    scored: ScoredPositions
    responses: int
    vocab_size: int
    loss: Callable[[Tensor], Tensor]
    loss_gradient: float | None = None
