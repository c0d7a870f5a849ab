"""Packed attention equals plain attention under an explicit mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simpo_megatron.models import attention_blocks
from simpo_megatron.models.attention import PackedAttention
from simpo_megatron.models.spec import RMSNorm
from tests.support.families import pack

LENGTHS = [1, 40, 7, 16, 3]


def config(window: int | None = None, heads: int = 4, softmax_type: str = "vanilla") -> Any:
    return SimpleNamespace(
        context_parallel_size=1,
        tensor_model_parallel_size=1,
        num_attention_heads=heads,
        params_dtype=torch.float64,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
        softmax_type=softmax_type,
    )


def attention(window: int | None = None, scale: float | None = None, softcap: float | None = None) -> PackedAttention:
    return PackedAttention(config(window), softmax_scale=scale, softcap=softcap)


def masked(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The oracle: [T, H, D] with one [T, T] mask, and a sink for each head [H] -> [T, H * D]."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(segment))
    distance = position[:, None] - position
    mask = (distance >= 0) & (segment[:, None] == segment) & (distance < (window or len(segment)))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[2] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(segment), -1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(segment)], v).flatten(1)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
@pytest.mark.parametrize("scale, softcap", [(None, None), (0.3, None), (None, 2.0), (0.3, 0.5)])
def test_packed_equals_masked(
    heads: tuple[int, int], window: int | None, scale: float | None, softcap: float | None, monkeypatch: Any
) -> None:
    torch.manual_seed(0)
    for name in ("BLOCK", "SCORES_BLOCK"):
        monkeypatch.setattr(attention_blocks, name, 12)  # so that blocks end within sequences and within windows
    q, k, v = (
        torch.randn(sum(LENGTHS), h, 8, dtype=torch.float64, requires_grad=True) for h in (heads[0], *heads[1:] * 2)
    )
    weights = torch.randn(sum(LENGTHS), heads[0] * 8, dtype=torch.float64)
    found = attention(window, scale, softcap)(q, k, v, packed_seq_params=pack(LENGTHS))
    expected = masked(q, k, v, LENGTHS, window, scale, softcap)
    torch.testing.assert_close(found, expected)
    for ours, oracle in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, oracle)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_every_head_has_a_sink(heads: tuple[int, int], window: int | None, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    for name in ("BLOCK", "SCORES_BLOCK"):
        monkeypatch.setattr(attention_blocks, name, 12)
    inputs = [torch.randn(sum(LENGTHS), h, 8, dtype=torch.float64, requires_grad=True) for h in (4, heads[1], heads[1])]
    weights = torch.randn(sum(LENGTHS), 4 * 8, dtype=torch.float64)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    ours = PackedAttention(config(window, softmax_type="learnable"))
    sinks = ours.softmax_offset
    assert sinks is not None
    sinks.data.copy_(torch.randn(4))
    found, expected = ours(*inputs, packed_seq_params=pack(LENGTHS)), masked(*inputs, LENGTHS, window, sinks=sinks)
    torch.testing.assert_close(found, expected)
    assert (found - masked(*inputs, LENGTHS, window)).abs().max() > 0.1
    gradients = [torch.autograd.grad((out * weights).sum(), (*inputs, sinks)) for out in (found, expected)]
    for mine, oracle in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, oracle)


def test_scores_far_beyond_the_cap_have_no_gradient() -> None:
    """No NaN at any size; a score that is the cap does not pull."""
    q, k, v = (torch.randn(5, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    found = attention(softcap=3.0)(q * 1e4, k, v, packed_seq_params=pack([5]))
    of_q, of_k, of_v = torch.autograd.grad(found.sum(), (q, k, v))
    assert found.isfinite().all() and of_v.isfinite().all()
    assert not of_q.any() and not of_k.any()


def test_plain_sequences_are_causal() -> None:
    q, k, v = (torch.randn(12, 3, heads, 8) for heads in (4, 2, 2))
    found = attention()(q, k, v)
    for b in range(3):
        torch.testing.assert_close(found[:, b], masked(q[:, b], k[:, b], v[:, b], [12]))


def test_padded_offsets_win() -> None:
    q, k, v = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    packed = pack([4, 5])
    packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = pack([6, 6]).cu_seqlens_q
    torch.testing.assert_close(attention()(q, k, v, packed_seq_params=packed), masked(q, k, v, [6, 6]))


def test_offsets_are_read_again_when_they_change() -> None:
    q, k, v = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    packed = pack([6, 6])
    attention()(q, k, v, packed_seq_params=packed)
    packed.cu_seqlens_q.copy_(pack([3, 9]).cu_seqlens_q)
    torch.testing.assert_close(attention()(q, k, v, packed_seq_params=packed), masked(q, k, v, [3, 9]))


def test_tokens_outside_every_segment_are_an_error() -> None:
    q, k, v = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="cu_seqlens end at 9, but the row has 12 tokens"):
        attention()(q, k, v, packed_seq_params=pack([4, 5]))


@pytest.mark.parametrize("keyword", ["window_size", "logit_cap", "k_channels"])
def test_a_keyword_that_is_not_known_is_an_error(keyword: str) -> None:
    with pytest.raises(TypeError, match=keyword):
        PackedAttention(config(), **{keyword: 1})
    q = torch.randn(12, 4, 8)
    with pytest.raises(TypeError, match=keyword):
        attention()(q, q, q, **{keyword: 1})


@pytest.mark.parametrize("keyword", ["zero_centered_gamma", "bias"])
def test_a_keyword_of_a_norm_that_is_not_known_is_an_error(keyword: str) -> None:
    config: Any = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
    with pytest.raises(TypeError, match=keyword):
        RMSNorm(config, 8, **{keyword: True})
