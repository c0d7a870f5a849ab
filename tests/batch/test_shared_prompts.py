"""Attention and positions of shared prompts against the plain row of the same pairs, values and gradients."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams

from simpo_megatron.batch.row import BatchCounts, RowFormat, pack_row
from tests.models.test_attention import attention
from tests.support.pairs import make_pairs

lengths = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(lengths, st.sampled_from([None, 1, 3, 8]), st.integers(0, 3))
def test_shared_and_plain_rows_give_the_same_scores(sizes: list[Any], window: int | None, padding: int) -> None:
    """Token and position decide queries, keys and values here, as they do in a model's first layer."""
    pairs, counts = make_pairs(sizes), BatchCounts(len(sizes), 1, 1)
    table = torch.randn(50, 24, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(len(sizes)))
    found = []
    for shared in (False, True):
        used = sum((1 if shared else 2) * prompt + chosen + rejected for prompt, chosen, rejected in sizes)
        row_format = RowFormat(share_prompts=shared, row_length=used + padding)
        batch = pack_row(pairs, range(len(sizes)), counts, row_format)
        weight = table.clone().requires_grad_()
        x = weight[batch.tokens[0], batch.position_ids[0]]
        packed: PackedSeqParams = batch.packed_seq_params
        out = attention(window)(x[:, :2], x[:, 2:3], x[:, 3:], packed_seq_params=packed)
        scores = (out[batch.scored.positions_R].sin() * batch.scored.targets_R[:, None]).sum(1)
        (gradient,) = torch.autograd.grad(batch.segment_sums(scores).cos().sum(), weight)
        found.append((scores, gradient))
    torch.testing.assert_close(found[0], found[1])
