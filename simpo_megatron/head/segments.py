"""Sums over the tokens of each response. The same numbers give the same sums, bit for bit, on every device.

`index_add_` adds with atomics on a GPU, in an order that differs from run to run. The segments of a packed row are
sorted, so each sum is one stretch of the values: `torch.segment_reduce` adds it in a fixed order.

Shapes: N scored positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(values_N: Tensor, segments_N: Tensor, count: int) -> Tensor:
    """The sum of the values of each segment. The host does not wait for the device.

    Args:
        values_N: fp32 or fp64; they may need a gradient.
        segments_N: the segment of each value, int64, ascending, from 0 to `count` - 1.
        count: how many segments there are. A segment without values has the sum 0.

    Returns:
        [count] in the dtype of the values. The sums are formed in fp64 and rounded once.
    """
    starts = torch.searchsorted(segments_N, torch.arange(count + 1, device=segments_N.device))
    # `unsafe` leaves out a check of the offsets, for which the host would wait.
    sums = torch.segment_reduce(values_N.double(), "sum", offsets=starts, initial=0, unsafe=True)
    return sums.to(values_N.dtype)
