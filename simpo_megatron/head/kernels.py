"""The element-wise work of the head on a slab of logits: its statistics, and later its gradient in the same memory.

On CUDA the Triton kernels of `triton_kernels.py` do it. Elsewhere, for fp64 and without Triton, torch does it, a block
of rows at a time, so that its temporaries stay in the cache.

Both subtract the target from the probability in fp32 and round the difference. Rounding first would lose the small
gradients of tokens that are predicted with a probability near 1.

Where the model caps its logits (`softcap`), the slab keeps those before the cap: both functions compute the cap anew.

Shapes: N scored positions, V columns of this tensor-parallel rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simpo_megatron.compat import have_triton

_BLOCK_BYTES = 4 * 2**20


def soft_cap(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`, in the dtype of the logits; the logits themselves for None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def row_statistics(logits_NV: Tensor, targets_N: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row, and the logit of each row's target, both of the capped logits.

    Args:
        logits_NV: any floating dtype; rows at any stride, columns adjacent; V may be 0.
        targets_N: column of each row's target, int64; -1 where another rank holds it.
        softcap: the bound of the model's logits (`soft_cap`); None for none.

    Returns:
        [N] and [N], fp32 (fp64 for fp64 logits). The log-sum-exp is -inf if there are no columns; the logit is 0 where
        another rank holds the target.
    """
    accumulate = torch.promote_types(logits_NV.dtype, torch.float32)
    if _triton_takes(logits_NV):
        from simpo_megatron.head import triton_kernels

        return triton_kernels.row_statistics(logits_NV, targets_N, softcap)
    lse_N = torch.empty(len(targets_N), dtype=accumulate, device=logits_NV.device)
    for rows in _blocks(logits_NV):
        lse_N[rows] = torch.logsumexp(soft_cap(logits_NV[rows].to(accumulate), softcap), dim=1)
    owned_N = targets_N >= 0
    if not logits_NV.shape[1]:
        return lse_N.fill_(-torch.inf), torch.zeros_like(lse_N)
    target_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0].to(accumulate)
    return lse_N, soft_cap(target_N, softcap) * owned_N


def write_gradient_(
    logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, coefficients_N: Tensor, softcap: float | None = None
) -> None:
    """Overwrites the logits with the gradient of sum(coefficients * log p(target)) by them, before the cap.

    Args:
        logits_NV: as for `row_statistics`.
        targets_N: as for `row_statistics`.
        lse_N: log-sum-exp of each row over the columns of all ranks, in the dtype that `row_statistics` returns.
        coefficients_N: derivative of the loss with respect to each row's log-prob, in the same dtype.
        softcap: as for `row_statistics`.
    """
    if _triton_takes(logits_NV):
        from simpo_megatron.head import triton_kernels

        triton_kernels.write_gradient_(logits_NV, targets_N, lse_N, coefficients_N, softcap)
        return
    if not logits_NV.shape[1]:
        return
    owned_N = coefficients_N * (targets_N >= 0)
    for rows in _blocks(logits_NV):
        logits = logits_NV[rows]
        gradient = logits if logits.dtype == lse_N.dtype else logits.to(lse_N.dtype)
        slope = None
        if softcap is not None:
            tanh = torch.tanh(gradient / softcap)
            gradient, slope = softcap * tanh, 1 - tanh.square()  # d(capped logit) / d(logit)
        gradient.sub_(lse_N[rows, None]).exp_().mul_(-coefficients_N[rows, None])
        gradient.scatter_add_(1, targets_N[rows, None].clamp(min=0), owned_N[rows, None])
        if slope is not None:
            gradient.mul_(slope)
        if gradient is not logits:
            logits.copy_(gradient)


def _triton_takes(logits_NV: Tensor) -> bool:
    """Whether the Triton kernels work on these logits. They compute in fp32, so fp64 is torch's on every device."""
    return logits_NV.is_cuda and logits_NV.dtype != torch.float64 and have_triton()


def _blocks(logits_NV: Tensor) -> list[slice]:
    """Blocks of rows of about `_BLOCK_BYTES` in fp32."""
    rows = max(1, _BLOCK_BYTES // (4 * max(1, logits_NV.shape[1])))
    return [slice(start, start + rows) for start in range(0, logits_NV.shape[0], rows)]
