"""`segment_sums` against fp64, its gradient, and empty segments."""

from __future__ import annotations

import pytest
import torch

from simpo_megatron.head.segments import segment_sums


def test_sums_are_rounded_once() -> None:
    """Log-probs of 4 responses of 5000 tokens: the fp32 sum is the fp64 sum, rounded."""
    values = -5 * torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    segments = torch.arange(4).repeat_interleave(5000)
    wanted = values.double().view(4, 5000).sum(1).float()
    assert torch.equal(segment_sums(values, segments, 4), wanted)
    assert not torch.equal(wanted, torch.zeros(4).index_add(0, segments, values)), "adding in fp32 is less exact"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient(dtype: torch.dtype) -> None:
    values = torch.arange(5, dtype=dtype).requires_grad_()
    sums = segment_sums(values, torch.tensor([1, 1, 1, 3, 3]), 5)
    assert sums.tolist() == [0, 3, 0, 7, 0] and sums.dtype == dtype
    (sums * torch.arange(5)).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1, 1, 1, 3, 3]


@pytest.mark.parametrize("count", [0, 2])
def test_no_values(count: int) -> None:
    values = torch.zeros(0, requires_grad=True)
    sums = segment_sums(values, torch.zeros(0, dtype=torch.int64), count)
    sums.sum().backward()
    assert sums.tolist() == [0.0] * count and values.grad is not None


def test_not_a_number_stays_in_its_segment() -> None:
    sums = segment_sums(torch.tensor([1.0, torch.nan, 2.0, -torch.inf]), torch.tensor([0, 1, 2, 3]), 4)
    assert sums.isnan().tolist() == [False, True, False, False] and sums[2] == 2 and sums[3] == -torch.inf
