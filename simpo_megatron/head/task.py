"""What one pass of the head scores. No Megatron, no process group.

Shapes: R scored positions of this context-parallel rank, P pairs, M scored responses of a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredPositions:
    """The positions of a packed row that score a response token. They are the same on all tensor-parallel ranks.

    Attributes:
        positions_R: index of each position among this rank's tokens, int64, in the order of the pairs. The last token
            of a shared prompt scores the first token of both responses, so it is there twice.
        targets_R: the token id that each position scores, int64, in the whole vocabulary.
        segments_R: the response that the scored token belongs to, pair * M + response, int64.
        per_pair: [P] scored positions of each pair on this rank, as Python integers, so that slabs are cut without a
            device sync.
        per_pair_max: [P] the same, maximum over context-parallel ranks. All ranks cut slabs by it, so that their
            collectives match.
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
        vocab_size: the true vocabulary; the columns behind it are padding and get neither probability nor gradient.
        loss: takes the log-probs [P, M], summed over all context-parallel ranks, fp32 (fp64 for fp64 weights). Returns
            a scalar: a sum of one differentiable term a pair.
        loss_gradient: the gradient of the loss that the backward pass will be given, if it is known. Then the gradient
            of the weight is added to an fp32 `main_grad` directly, without a copy of it and without rounding.
        slopes: takes the same sums. Returns the derivative of the loss with respect to each, [P, M], in closed form; or
            None, and then the head differentiates the loss with autograd. It is called after every slab, while the sums
            of later pairs are still 0.
    """

    scored: ScoredPositions
    responses: int
    vocab_size: int
    loss: Callable[[Tensor], Tensor]
    loss_gradient: float | None = None
    slopes: Callable[[Tensor], Tensor | None] | None = None

    def slopes_of(self, sums_PM: Tensor) -> Tensor:
        """The derivative of the loss with respect to each sum, [P, M], from `slopes` or by autograd."""
        slopes_PM = None if self.slopes is None else self.slopes(sums_PM)
        if slopes_PM is None:
            with torch.enable_grad():
                variables_PM = sums_PM.detach().clone().requires_grad_()
                (slopes_PM,) = torch.autograd.grad(self.loss(variables_PM), variables_PM)
        return slopes_PM
