"""The packed rows of a batch: every pair once, rows full, ranks and microbatches alike in cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_megatron.data import pack_batch, pack_rows, pair_costs, pairs_of_batch

lengths_and_row = st.integers(1, 50).flatmap(
    lambda row: st.tuples(st.lists(st.integers(1, row), max_size=60).map(np.array), st.just(row))
)


def flat(rows: list[list[int]]) -> list[int]:
    return sorted(pair for row in rows for pair in row)


@given(lengths_and_row)
def test_packing_holds_every_pair_once_within_the_row(case: tuple[np.ndarray, int]) -> None:
    lengths, row = case
    rows = pack_rows(lengths, row)
    assert flat(rows) == list(range(len(lengths)))
    sums = [int(lengths[pairs].sum()) for pairs in rows]
    assert all(0 < tokens <= row for tokens in sums)
    assert rows == pack_rows(lengths.copy(), row)
    # No row could be poured into another one.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > row


def test_best_fit() -> None:
    assert pack_rows(np.array([3, 6, 5, 4, 2]), 10) == [[1, 3], [2, 0, 4]]


def test_pair_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="pair 1 has 11 tokens, a row has 10"):
        pack_rows(np.array([3, 11]), 10)


@given(lengths_and_row, st.integers(1, 9), st.integers(1, 4))
def test_a_batch_holds_every_pair_once(case: tuple[np.ndarray, int], ranks: int, multiple: int) -> None:
    lengths, row = case
    by_rank = pack_batch(lengths, row, ranks, multiple)
    assert len(by_rank) == ranks
    counts = {len(microbatches) for microbatches in by_rank}
    assert len(counts) == 1
    assert min(counts) >= 1
    assert min(counts) % multiple == 0
    rows = [pairs for rank in by_rank for pairs in rank]
    assert flat(rows) == list(range(len(lengths)))
    assert all(sum(int(lengths[pair]) for pair in pairs) <= row for pairs in rows)
    assert min(counts) - multiple < max(1, -(-len(pack_rows(lengths, row)) // ranks))  # not more than needed
    for rank in by_rank:  # empty rows come last
        assert [bool(row) for row in rank] == sorted((bool(row) for row in rank), reverse=True)
    assert by_rank == pack_batch(lengths.copy(), row, ranks, multiple)


@given(lengths_and_row, st.integers(1, 9))
def test_ranks_are_balanced(case: tuple[np.ndarray, int], ranks: int) -> None:
    lengths, row = case
    sums = [sum(int(lengths[pair]) for row in rank for pair in row) for rank in pack_batch(lengths, row, ranks)]
    assert max(sums) - min(sums) <= row


def realistic(count: int, seed: int) -> np.ndarray:
    """Prompt, chosen and rejected tokens, distributed as those of judged answers are."""
    generator = np.random.default_rng(seed)
    median, spread = np.array([[32], [300], [100]]), np.array([[0.9], [0.7], [0.9]])
    return np.clip(median * np.exp(spread * generator.standard_normal((3, count))), 1, 1000).astype(np.int64)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_nearly_full(seed: int) -> None:
    prompt, chosen, rejected = realistic(1280, seed)
    lengths = 2 * prompt + chosen + rejected
    rows = sum(len(pack_rows(lengths[start : start + 128], 4096)) for start in range(0, 1280, 128))
    fewest = sum(-(-int(lengths[start : start + 128].sum()) // 4096) for start in range(0, 1280, 128))
    assert rows <= 1.02 * fewest, "a last row is rarely full; beyond that hardly anything is wasted"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_and_microbatches_cost_alike(ranks: int) -> None:
    prompt, chosen, rejected = realistic(256, ranks)
    costs = pair_costs(prompt, [chosen, rejected], hidden_size=1024)
    by_rank = pack_batch(2 * prompt + chosen + rejected, 4096, ranks, costs=costs)
    of_row = np.array([[costs[row].sum() for row in rank] for rank in by_rank])
    assert of_row.sum(axis=1).max() < 1.03 * of_row.sum(axis=1).mean()
    assert of_row.max() < 1.1 * of_row.mean(), "no microbatch keeps a pipeline waiting"


def test_pairs_that_cannot_be_spread_stay_packed() -> None:
    lengths = np.array([6, 5, 5, 4])  # by cost: 6 | 5, then 5 beside 5, and 4 fits only beside 6
    assert pack_batch(lengths, 10, 1) == [[[0, 3], [1, 2]]]


def test_an_even_spread_beats_best_fit() -> None:
    rows = pack_rows(np.array([4, 4, 3, 3, 3, 3]), 10)  # best fit decreasing: 4 4, 3 3 3, 3
    assert flat(rows) == list(range(6)) and len(rows) == 2


def test_costs_by_hand() -> None:
    prompt, responses = np.array([3]), [np.array([2]), np.array([1])]
    assert pair_costs(prompt, responses, hidden_size=1) == pytest.approx([5 + 4 + (25 + 16) / 12])
    # Once: prompt and chosen as they were; of the rejected response only what it adds.
    assert pair_costs(prompt, responses, hidden_size=1, shared=True) == pytest.approx([5 + 1 + (25 + 16 - 9) / 12])
    assert pair_costs(prompt, responses[:1], hidden_size=1) == pytest.approx([5 + 25 / 12])


@given(lengths_and_row, st.integers(1, 7), st.integers(1, 12), st.integers(0, 99))
def test_every_pair_of_an_epoch_once_whatever_the_ranks(
    case: tuple[np.ndarray, int], ranks: int, batch: int, seed: int
) -> None:
    lengths, row = case
    seen = []
    for position in range(0, len(lengths), batch):
        pairs = pairs_of_batch(position, min(batch, len(lengths) - position), len(lengths), seed)
        by_rank = pack_batch(lengths[pairs], row, ranks)
        seen += [int(pairs[i]) for rank in by_rank for packed in rank for i in packed]
    assert sorted(seen) == list(range(len(lengths)))


def test_rows_are_dealt_back_and_forth() -> None:
    assert pack_batch(np.array([10, 9, 8, 7]), 10, 2) == [[[0], [3]], [[1], [2]]]


def test_no_pairs_is_one_empty_row_a_rank() -> None:
    assert pack_batch(np.array([], dtype=np.int64), 10, 2, 2) == [[[], []], [[], []]]
