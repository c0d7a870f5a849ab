"""The element-wise work of the head in Triton: one program a row, fp32 inside. `kernels.py` says what is computed.

The first kernel reads a row once. The second reads it once and writes the gradient over it. That is 6 bytes of memory
traffic for a bf16 logit.

Whole blocks of columns are read and written without a mask. With a mask, the compiler could not load several columns at
a time if 16 does not divide their number. Offsets are int64, because rows times stride exceeds 2**31 from 16384 rows of
131072 columns on.

With TRITON_INTERPRET=1 the kernels run on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def row_statistics(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the target's logit of each row, fp32; see `kernels.row_statistics`."""
    lse_N, target_N = (torch.empty(len(targets_N), dtype=torch.float32, device=logits_NV.device) for _ in range(2))
    _launch(statistics_kernel, logits_NV, targets_N, lse_N, target_N)
    return lse_N, target_N


def write_gradient_(logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, coefficients_N: Tensor) -> None:
    """Overwrites the logits with their gradient; see `kernels.write_gradient_`."""
    _launch(gradient_kernel, logits_NV, targets_N, lse_N, coefficients_N)


def _launch(kernel: Any, logits_NV: Tensor, *rows_N: Tensor) -> None:
    """Runs a kernel, one program a row."""
    rows, columns = logits_NV.shape
    assert logits_NV.stride(1) == 1 or columns < 2, "columns must be adjacent"
    if rows:
        kernel[(rows,)](
            logits_NV,
            *(values_N.contiguous() for values_N in rows_N),
            logits_NV.stride(0),
            columns,
            BLOCK=4096,
            num_warps=8,
        )


@triton.jit
def _add(x: tl.tensor, maximum: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Adds a value to the running maximum and sum of exponentials of each lane."""
    larger = tl.maximum(maximum, x)
    return larger, total * tl.exp(maximum - larger) + tl.exp(x - larger)


@triton.jit
def statistics_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    lse: tl.tensor,
    target_logits: tl.tensor,
    stride: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The log-sum-exp of one row, and its target's logit."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        maximum, total = _add(tl.load(start + first + tl.arange(0, BLOCK)).to(tl.float32), maximum, total)
    index = whole + tl.arange(0, BLOCK)
    real = index < columns
    larger, sum = _add(tl.load(start + index, mask=real, other=0.0).to(tl.float32), maximum, total)
    maximum, total = tl.where(real, larger, maximum), tl.where(real, sum, total)
    highest = tl.max(maximum, 0)
    # A lane without columns has a sum of 0 and a maximum of -inf. A NaN stays in the sum; tl.maximum would drop it.
    total = tl.sum(total * tl.where(total == 0.0, 0.0, tl.exp(maximum - highest)), 0)
    tl.store(lse + row, highest + tl.log(total))
    target = tl.load(targets + row)
    tl.store(target_logits + row, tl.load(start + target, mask=target >= 0, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    lse: tl.tensor,
    coefficients: tl.tensor,
    stride: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Overwrites the logits of one row with coefficient * ([column is the target] - exp(logit - lse))."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target, row_lse, coefficient = tl.load(targets + row), tl.load(lse + row), tl.load(coefficients + row)
    whole = columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        index = first + tl.arange(0, BLOCK)
        x = tl.load(start + index)
        gradient = coefficient * ((index == target).to(tl.float32) - tl.exp(x.to(tl.float32) - row_lse))
        tl.store(start + index, gradient.to(x.dtype))
    index = whole + tl.arange(0, BLOCK)
    x = tl.load(start + index, mask=index < columns, other=float("-inf"))
    gradient = coefficient * ((index == target).to(tl.float32) - tl.exp(x.to(tl.float32) - row_lse))
    tl.store(start + index, gradient.to(x.dtype), mask=index < columns)
