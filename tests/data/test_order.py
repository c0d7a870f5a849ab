"""The data order: every pair exactly once in an epoch, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_megatron.data import pairs_of_batch
from simpo_megatron.data.order import blended_order


@given(st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 4))
def test_epochs_are_permutations(num_pairs: int, seed: int, epoch: int) -> None:
    order = pairs_of_batch(epoch * num_pairs, num_pairs, num_pairs, seed)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(num_pairs))


@given(st.integers(1, 20), st.integers(0, 100), st.lists(st.integers(0, 45), max_size=5), st.booleans())
def test_batches_of_any_size_are_slices_of_one_order(
    num_pairs: int, start: int, sizes: list[int], shuffle: bool
) -> None:
    whole = pairs_of_batch(0, start + sum(sizes), num_pairs, seed=7, shuffle=shuffle)
    position = start
    for size in sizes:
        batch = pairs_of_batch(position, size, num_pairs, seed=7, shuffle=shuffle)
        assert batch.tolist() == whole[position : position + size].tolist()
        position += size


def test_orders_differ_between_seeds_and_epochs_and_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return pairs_of_batch(100 * epoch, 100, 100, seed).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    order(1, 0).reverse()
    pairs_of_batch(0, 100, 100, 1)[:] = 0  # what is returned is the caller's own
    assert sorted(order(1, 0)) == list(range(100))


def test_file_order_without_shuffling() -> None:
    assert pairs_of_batch(3, 6, 5, seed=1, shuffle=False).tolist() == [3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("position, batch, num_pairs", [(-1, 1, 1), (0, -1, 1), (0, 1, 0)])
def test_out_of_range(position: int, batch: int, num_pairs: int) -> None:
    with pytest.raises(
        ValueError, match=f"position {position}, batch {batch} or num_pairs {num_pairs} is out of range"
    ):
        pairs_of_batch(position, batch, num_pairs, seed=0)


parts = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@given(parts, st.integers(0, 2**20), st.booleans())
def test_a_source_of_a_blend_repeats_no_pair_before_all_were_seen(
    parts: list[tuple[int, int]], seed: int, shuffle: bool
) -> None:
    sizes, counts = zip(*parts, strict=True)
    epochs = 3
    source, index = blended_order(0, epochs * sum(counts), sizes, counts, seed, shuffle)
    for epoch in range(epochs):
        drawn = np.bincount(source[epoch * sum(counts) : (epoch + 1) * sum(counts)], minlength=len(sizes))
        assert drawn.tolist() == list(counts), "every epoch has the shares of the blend"
    for number, size in enumerate(sizes):
        drawn = index[source == number].tolist()
        assert max(drawn) < size
        seen = np.bincount(drawn, minlength=size)
        assert seen.max() - seen.min() <= 1


@given(parts, st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**20))
def test_a_blend_is_a_function_of_the_position(parts: list[tuple[int, int]], start: int, count: int, seed: int) -> None:
    sizes, counts = zip(*parts, strict=True)
    source, index = blended_order(0, start + count, sizes, counts, seed)
    later = blended_order(start, count, sizes, counts, seed)
    assert [source[start:].tolist(), index[start:].tolist()] == [part.tolist() for part in later]


def test_a_blend_out_of_range() -> None:
    with pytest.raises(ValueError, match="out of range"):
        blended_order(-1, 1, [3], [3], 0)
