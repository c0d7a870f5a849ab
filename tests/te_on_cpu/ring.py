"""What ring attention does between its steps: under context parallelism a rank holds two halves of each sequence."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.kernels import only


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    """Packed rows to a padded batch, for unfused attention."""
    out = tensor.new_zeros(batch, longest, *tensor.shape[1:])
    for i, rows in enumerate(tensor.split(cu_seqlens.diff().tolist())):
        out[i, : len(rows)] = rows
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """A padded batch to packed rows."""
    return torch.cat([rows[:n] for rows, n in zip(tensor, cu_seqlens.diff().tolist(), strict=True)])


def _rows(cu_seqlens: Tensor, *halves: int) -> Tensor:
    """The rows of these halves of every sequence."""
    offsets = cu_seqlens.tolist()
    spans = [(a, (a + b) // 2, b) for a, b in itertools.pairwise(offsets)]
    return torch.cat([torch.arange(span[half], span[half + 1]) for span in spans for half in halves])


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half: int) -> Tensor:
    """One half of every sequence."""
    return tensor.index_select(tensor.dim() - 3, _rows(cu_seqlens, half))


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, packed: bool, length: int) -> Tensor:
    """The softmax statistics [heads, rows] of the second halves."""
    only(packed, "softmax statistics that are not packed")
    rows = _rows(cu_seqlens, 1)
    out = lse.new_zeros(len(lse), length)
    out[:, : len(rows)] = lse[:, rows]
    return out


def thd_second_half_lse_correction(lse: Tensor, step: Tensor, cu_seqlens: Tensor, packed: bool) -> None:
    """Joins the statistics of a step over the second halves."""
    rows = _rows(cu_seqlens, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], step[:, : len(rows)])


def _joined(out: Tensor, step: Tensor, old: Any, lse: Tensor, lse_step: Tensor, cu: Tensor, second: bool) -> None:
    """Adds the output of a step. `old` are the statistics of `out`; None if `out` has those of all steps already."""
    rows = _rows(cu, 1) if second else _rows(cu, 0, 1)

    def factor(of: Tensor) -> Tensor:
        return (of - lse[:, rows]).exp().t()[..., None]

    before = out[rows].float() * (1 if old is None else factor(old[:, rows]))
    step = step.reshape(-1, *out.shape[1:])[: len(rows)].float()
    out[rows] = (before + step * factor(lse_step[:, : len(rows)])).to(out.dtype)


def thd_out_correction(out: Tensor, step: Tensor, *rest: Any) -> None:
    """Adds the output of a step: 2.11 when all steps are done, newer releases after each step."""
    *statistics, cu_seqlens, second, packed = rest
    only(packed, "softmax statistics that are not packed")
    old = statistics.pop(0) if len(statistics) == 3 else None
    _joined(out, step, old, *statistics, cu_seqlens, second)


def thd_grad_correction(grad: Tensor, step: Tensor, cu_seqlens: Tensor, *how: str) -> None:
    """Adds or copies the gradient of a step into each half; "none" leaves a half, "zero" clears it."""
    whole = "none" not in how and "zero" not in how  # else the step has one half alone
    dim = grad.dim() - 3
    for half, action in enumerate(how):
        if action == "none":
            continue
        rows = _rows(cu_seqlens, half)
        index = (slice(None),) * dim + (rows,)
        if action == "zero":
            grad[index] = 0
            continue
        value = step[index] if whole else step.narrow(dim, 0, len(rows))
        grad[index] = value if action == "copy" else grad[index] + value


def _rank_order(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """The rows of whole sequences in the order of the ranks: each holds two chunks of every sequence."""
    spans = [torch.arange(a, b).chunk(2 * cp_size) for a, b in itertools.pairwise(cu_seqlens.tolist()) if b > a]
    return torch.cat([chunks[i] for rank in range(cp_size) for chunks in spans for i in (rank, 2 * cp_size - 1 - rank)])


def thd_sequence_order_to_cp_rank_order(x: Tensor, cu_seqlens: Tensor, cp_size: int, rows: int) -> Tensor:
    """Gathered rows in the order of the ranks."""
    return x[_rank_order(cu_seqlens, cp_size)]


def thd_cp_rank_order_to_sequence_order(x: Tensor, cu_seqlens: Tensor, cp_size: int, rows: int) -> Tensor:
    """The inverse."""
    return x[_rank_order(cu_seqlens, cp_size).argsort()]


def thd_copy_valid_tokens_from_per_split_to_rank_local(
    out: Tensor, split: Tensor, starts: Tensor, cu_seqlens: Tensor
) -> None:
    """Copies the rows that a step computed, from where each sequence starts."""
    for start, length in zip(starts.tolist(), cu_seqlens.diff().tolist(), strict=False):
        out[start : start + length] = split[start : start + length]
