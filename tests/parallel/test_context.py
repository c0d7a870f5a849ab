"""The zig-zag slices of small rows, and attention over them against attention on one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.models import attention
from simpo_megatron.models.attention import PackedAttention
from simpo_megatron.parallel.context import positions, round_up, sequence_multiple, zigzag_slices
from tests.models.test_attention import masked
from tests.support.distributed import Collectives
from tests.support.families import pack


def test_slices_written_out() -> None:
    assert positions([0, 8], 2, 0).tolist() == [0, 1, 6, 7]
    assert positions([0, 8], 2, 1).tolist() == [2, 3, 4, 5]
    assert positions([0, 4, 12], 2, 1).tolist() == [1, 2, 6, 7, 8, 9]
    assert positions([0, 3, 7], 1, 0).tolist() == list(range(7))
    assert zigzag_slices(10, 22, 3, 2) == (slice(14, 16), slice(16, 18))
    assert (sequence_multiple(1), sequence_multiple(4)) == (1, 8)
    assert (round_up(9, 4), round_up(8, 4), round_up(0, 4)) == (12, 8, 0)


LENGTHS = [8, 40, 16, 24]
HEADS = (4, 2)


def problem() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (HEADS[0], HEADS[1], HEADS[1])]
    qkv = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return qkv, torch.randn(sum(LENGTHS), HEADS[0] * 8, dtype=torch.float64, generator=generator)


def attend(window: int | None, block: int) -> tuple[Tensor, list[Tensor], dict[str, int]]:
    """On a rank: the output of its slices, their gradients, and the collectives it took."""
    attention._BLOCK = block
    config: Any = SimpleNamespace(
        context_parallel_size=dist.get_world_size(),
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
        softmax_type="vanilla",
    )
    module = PackedAttention(config, pg_collection=SimpleNamespace(cp=dist.group.WORLD))
    qkv, weights = problem()
    packed = pack(LENGTHS)
    mine = torch.from_numpy(positions(packed.cu_seqlens_q.tolist(), dist.get_world_size(), dist.get_rank()))
    inputs = [x[mine].clone().requires_grad_() for x in qkv]
    with Collectives() as collectives:
        out = module(*inputs, packed_seq_params=packed)
        (out * weights[mine]).sum().backward()
    attention._BLOCK = 1024
    return out.detach(), [x.grad for x in inputs], collectives.counts


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_attention_over_slices_equals_one_rank(pool: Any, world: int, window: int | None) -> None:
    qkv, weights = problem()
    for x in qkv:
        x.requires_grad_()
    whole = masked(*qkv, LENGTHS, window, None)
    wanted = torch.autograd.grad((whole * weights).sum(), qkv)
    offsets = pack(LENGTHS).cu_seqlens_q.tolist()
    for rank, (out, gradients, counted) in enumerate(pool.run(world, attend, window, 3)):
        mine = torch.from_numpy(positions(offsets, world, rank))
        torch.testing.assert_close(out, whole[mine])
        for gradient, exact in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, exact[mine])
        assert counted == {"allgather_base": 1, "reduce_scatter_base": 1}  # keys and values in one, and back


def refuse() -> list[str]:
    config: Any = SimpleNamespace(
        context_parallel_size=2,
        attention_dropout=0.0,
        window_size=None,
        window_attn_skip_freq=None,
        softmax_type="vanilla",
    )
    module = PackedAttention(config, pg_collection=SimpleNamespace(cp=dist.group.WORLD))
    q, k, v = (torch.randn(6, heads, 8) for heads in (4, 2, 2))
    found = []
    for inputs, packed in (((q[:, None], k[:, None], v[:, None]), None), ((q, k, v), pack([6, 6]))):
        with pytest.raises(ValueError) as raised:
            module(*inputs, packed_seq_params=packed)
        found.append(str(raised.value))
    return found


def test_rows_that_cannot_be_sliced_are_an_error(pool: Any) -> None:
    for unpacked, uneven in pool.run(2, refuse):
        assert "needs a packed row" in unpacked
        assert "multiple of 4 tokens, but cu_seqlens are [0, 6, 12]" in uneven
