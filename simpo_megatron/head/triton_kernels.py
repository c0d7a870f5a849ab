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

BLOCK = tl.constexpr(4096)  # columns at a time


def row_statistics(logits_NV: Tensor, targets_N: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the target's logit of each row, fp32; see `kernels.row_statistics`."""
    lse_N, target_N = (torch.empty(len(targets_N), dtype=torch.float32, device=logits_NV.device) for _ in range(2))
    _launch(statistics_kernel, softcap, logits_NV, targets_N, lse_N, target_N)
    return lse_N, target_N


def write_gradient_(
    logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, coefficients_N: Tensor, softcap: float | None = None
) -> None:
    """Overwrites the logits with their gradient; see `kernels.write_gradient_`."""
    _launch(gradient_kernel, softcap, logits_NV, targets_N, lse_N, coefficients_N)


def _launch(kernel: Any, softcap: float | None, logits_NV: Tensor, *rows_N: Tensor) -> None:
    """Runs a kernel, one program a row. The cap is a constant of the compiled kernel; 0 means none."""
    rows, columns = logits_NV.shape
    assert logits_NV.stride(1) == 1 or columns < 2, "columns must be adjacent"
    if rows:
        kernel[(rows,)](
            logits_NV,
            *(values_N.contiguous() for values_N in rows_N),
            logits_NV.stride(0),
            columns,
            SOFTCAP=softcap or 0.0,
            num_warps=8,
        )


@triton.jit
def _decay(x: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """exp(-2 |x| / SOFTCAP), of which the cap and its derivative are made: there is no tanh for all platforms."""
    return tl.exp(tl.abs(x) * (-2.0 / SOFTCAP))


@triton.jit
def _cap(x: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """SOFTCAP * tanh(x / SOFTCAP) in fp32; x where SOFTCAP is 0."""
    x = x.to(tl.float32)
    if SOFTCAP > 0:
        decay = _decay(x, SOFTCAP)
        bounded = SOFTCAP * (1 - decay) / (1 + decay)
        x = tl.where(x < 0, -bounded, bounded)
    return x


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
    SOFTCAP: tl.constexpr,
) -> None:
    """The log-sum-exp of one row, and its target's logit."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        maximum, total = _add(_cap(tl.load(start + first + tl.arange(0, BLOCK)), SOFTCAP), maximum, total)
    index = whole + tl.arange(0, BLOCK)
    real = index < columns
    larger, sum = _add(_cap(tl.load(start + index, mask=real, other=0.0), SOFTCAP), maximum, total)
    maximum, total = tl.where(real, larger, maximum), tl.where(real, sum, total)
    highest = tl.max(maximum, 0)
    # A lane without columns has a sum of 0 and a maximum of -inf. A NaN stays in the sum; tl.maximum would drop it.
    total = tl.sum(total * tl.where(total == 0.0, 0.0, tl.exp(maximum - highest)), 0)
    tl.store(lse + row, highest + tl.log(total))
    target = tl.load(targets + row)
    tl.store(target_logits + row, _cap(tl.load(start + target, mask=target >= 0, other=0.0), SOFTCAP))


@triton.jit
def _gradient(
    x: tl.tensor, is_target: tl.tensor, lse: tl.tensor, coefficient: tl.tensor, SOFTCAP: tl.constexpr
) -> tl.tensor:
    """The derivative by logits x: coefficient * ([target] - exp(capped - lse)), times that of the cap."""
    gradient = coefficient * (is_target.to(tl.float32) - tl.exp(_cap(x, SOFTCAP) - lse))
    if SOFTCAP > 0:
        decay = _decay(x.to(tl.float32), SOFTCAP)
        gradient = gradient * (4 * decay / ((1 + decay) * (1 + decay)))  # 1 - tanh^2
    return gradient.to(x.dtype)


@triton.jit
def gradient_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    lse: tl.tensor,
    coefficients: tl.tensor,
    stride: tl.tensor,
    columns: tl.tensor,
    SOFTCAP: tl.constexpr,
) -> None:
    """Overwrites the logits of one row with their gradient."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target, row_lse, coefficient = tl.load(targets + row), tl.load(lse + row), tl.load(coefficients + row)
    whole = columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        index = first + tl.arange(0, BLOCK)
        x = tl.load(start + index)
        tl.store(start + index, _gradient(x, index == target, row_lse, coefficient, SOFTCAP))
    index = whole + tl.arange(0, BLOCK)
    x = tl.load(start + index, mask=index < columns, other=0.0)
    gradient = _gradient(x, index == target, row_lse, coefficient, SOFTCAP)
    tl.store(start + index, gradient, mask=index < columns)
