"""The data order and the plan of a batch: every pair exactly once, whatever the sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_megatron.data import pack_rows, pairs_of_batch, plan_batch

lengths_and_row = st.integers(1, 50).flatmap(
    lambda row: st.tuples(st.lists(st.integers(1, row), max_size=60).map(np.array), st.just(row))
)


def flat(rows):
    return sorted(pair for row in rows for pair in row)


@given(st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 4))
def test_epochs_are_permutations(num_pairs, seed, epoch):
    order = pairs_of_batch(epoch * num_pairs, num_pairs, num_pairs, seed)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(num_pairs))


@given(st.integers(1, 20), st.integers(0, 100), st.lists(st.integers(0, 45), max_size=5), st.booleans())
def test_batches_of_any_size_are_slices_of_one_order(num_pairs, start, sizes, shuffle):
    whole = pairs_of_batch(0, start + sum(sizes), num_pairs, seed=7, shuffle=shuffle)
    position = start
    for size in sizes:
        batch = pairs_of_batch(position, size, num_pairs, seed=7, shuffle=shuffle)
        assert batch.tolist() == whole[position : position + size].tolist()
        position += size


def test_orders_differ_between_seeds_and_epochs_and_repeat():
    def order(seed, epoch):
        return pairs_of_batch(100 * epoch, 100, 100, seed).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    order(1, 0).reverse()
    pairs_of_batch(0, 100, 100, 1)[:] = 0  # what is returned is the caller's own
    assert sorted(order(1, 0)) == list(range(100))


def test_file_order_without_shuffling():
    assert pairs_of_batch(3, 6, 5, seed=1, shuffle=False).tolist() == [3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("position, batch, num_pairs", [(-1, 1, 1), (0, -1, 1), (0, 1, 0)])
def test_out_of_range(position, batch, num_pairs):
    with pytest.raises(
        ValueError, match=f"position {position}, batch {batch} or num_pairs {num_pairs} is out of range"
    ):
        pairs_of_batch(position, batch, num_pairs, seed=0)


@given(lengths_and_row)
def test_packing_holds_every_pair_once_within_the_row(case):
    lengths, row = case
    rows = pack_rows(lengths, row)
    assert flat(rows) == list(range(len(lengths)))
    sums = [int(lengths[pairs].sum()) for pairs in rows]
    assert all(0 < tokens <= row for tokens in sums)
    assert rows == pack_rows(lengths.copy(), row)
    # No row could be poured into another one.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > row


def test_best_fit():
    assert pack_rows(np.array([3, 6, 5, 4, 2]), 10) == [[1, 3], [2, 0, 4]]


def test_pair_longer_than_a_row():
    with pytest.raises(ValueError, match="pair 1 has 11 tokens, a row has 10"):
        pack_rows(np.array([3, 11]), 10)


@given(lengths_and_row, st.integers(1, 9), st.integers(1, 4))
def test_plan(case, ranks, multiple):
    lengths, row = case
    plan = plan_batch(lengths, row, ranks, multiple)
    assert len(plan) == ranks
    counts = {len(packs) for packs in plan}
    assert len(counts) == 1
    assert min(counts) >= 1
    assert min(counts) % multiple == 0
    packs = [pack for rank in plan for pack in rank]
    assert flat(packs) == list(range(len(lengths)))
    assert all(sum(int(lengths[pair]) for pair in pack) <= row for pack in packs)
    assert min(counts) - multiple < max(1, -(-len(pack_rows(lengths, row)) // ranks))  # not more than needed
    for rank in plan:  # empty packs come last
        assert [bool(pack) for pack in rank] == sorted((bool(pack) for pack in rank), reverse=True)
    assert plan == plan_batch(lengths.copy(), row, ranks, multiple)


@given(lengths_and_row, st.integers(1, 9))
def test_ranks_are_balanced(case, ranks):
    lengths, row = case
    sums = [sum(int(lengths[pair]) for pack in rank for pair in pack) for rank in plan_batch(lengths, row, ranks)]
    assert max(sums) - min(sums) <= row


def test_rows_are_dealt_back_and_forth():
    assert plan_batch(np.array([10, 9, 8, 7]), 10, 2) == [[[0], [3]], [[1], [2]]]


def test_no_pairs_is_one_empty_pack_a_rank():
    assert plan_batch(np.array([], dtype=np.int64), 10, 2, 2) == [[[], []], [[], []]]
