"""What the head must compute, in fp64: loss, sums and both gradients. `bench_head.py` and `tests/head` compare with it.

    row = lay_out([(prompt, chosen, rejected), ...], responses=2)      # where the scored positions of a packed row are
    expected = oracle(hidden_TH[row.positions_R], weight_VH, targets_T[row.positions_R], row, loss)

Shapes: T tokens of the row, R scored positions, H hidden, V vocabulary, P pairs, M scored responses of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256  # positions whose logits are held at a time


@dataclass(frozen=True)
class Row:
    """The scored positions of a packed row.

    Attributes:
        starts: index of the first token of each sequence, and the end of the last.
        positions_R: index of each scored position in the row, in the order of the pairs.
        segments_R: the response of each position, pair * M + response.
        lengths_PM: scored positions of each response.
    """

    starts: tuple[int, ...]
    positions_R: Tensor
    segments_R: Tensor
    lengths_PM: Tensor

    def sums(self, values_R: Tensor) -> Tensor:
        """Sums the values of the positions by response: [P, M]."""
        sums_S = values_R.new_zeros(self.lengths_PM.numel())
        return sums_S.index_add(0, self.segments_R.to(values_R.device), values_R).view_as(self.lengths_PM)


def lay_out(lengths: Sequence[Sequence[int]], responses: int) -> Row:
    """Lays pairs out in a row, each response behind its own copy of the prompt.

    Args:
        lengths: tokens of prompt, chosen and rejected response of each pair.
        responses: how many responses of a pair are in the row.
    """
    sizes = [(prompt, size) for prompt, *both in lengths for size in both[:responses]]
    starts = torch.tensor([0, *(prompt + size for prompt, size in sizes)]).cumsum(0).tolist()
    scored = [
        torch.arange(start + prompt, start + prompt + size)
        for (prompt, size), start in zip(sizes, starts, strict=False)
    ]
    counts = torch.tensor([size for _, size in sizes], dtype=torch.int64)
    return Row(
        starts=tuple(starts),
        positions_R=torch.cat([torch.zeros(0, dtype=torch.int64), *scored]),
        segments_R=torch.arange(len(sizes)).repeat_interleave(counts),
        lengths_PM=counts.view(-1, responses),
    )


@dataclass(frozen=True)
class Expected:
    """What the head must compute, in fp64 and without gradient.

    Attributes:
        loss: scalar.
        sums_PM: summed log-probs of each response.
        hidden_RH: gradient of the scored positions' hidden states.
        weight_VH: gradient of the weight.
    """

    loss: Tensor
    sums_PM: Tensor
    hidden_RH: Tensor
    weight_VH: Tensor


def oracle(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    row: Row,
    loss: Callable[[Tensor], Tensor],
    softcap: float | None = None,
) -> Expected:
    """Computes everything from the definition, with torch's log_softmax and autograd, a block of positions at a time.

    Args:
        hidden_RH: hidden states of the scored positions, any dtype.
        weight_VH: the output layer without padding, any dtype.
        targets_R: the token that each position scores.
        row: the positions.
        loss: from the sums [P, M] to a scalar.
        softcap: the bound of the model's logits; None for none.
    """
    hidden_RH = hidden_RH.detach().double().clone().requires_grad_()
    weight_VH = weight_VH.detach().double().clone().requires_grad_()
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(hidden_RH), _BLOCK)]

    def logps(block: slice) -> Tensor:
        logits_NV = hidden_RH[block] @ weight_VH.T
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        every_NV = logits_NV.log_softmax(-1)
        return every_NV.gather(1, targets_R[block, None])[:, 0]

    with torch.no_grad():
        logps_R = torch.cat([hidden_RH.new_zeros(0), *map(logps, blocks)])
    logps_R.requires_grad_()
    sums_PM = row.sums(logps_R)
    value = loss(sums_PM)
    (slopes_R,) = torch.autograd.grad(value, logps_R)
    hidden_RH.grad, weight_VH.grad = torch.zeros_like(hidden_RH), torch.zeros_like(weight_VH)
    for block in blocks:
        logps(block).backward(slopes_R[block])
    return Expected(value.detach(), sums_PM.detach(), hidden_RH.grad, weight_VH.grad)
