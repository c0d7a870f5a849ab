"""The order of the data: a pure function of seed and position, so a resumed run needs nothing but its position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def pairs_of_batch(position: int, batch: int, num_pairs: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """The pairs at positions [position, position + batch) of the endless data order.

    Epoch e is at positions [e * num_pairs, (e + 1) * num_pairs): a permutation of all pairs, drawn from (seed, e). A
    batch may lie in two epochs.

    Args:
        position: of the first pair.
        batch: number of pairs.
        num_pairs: of the data.
        seed: of the shuffling.
        shuffle: False: every epoch is in the order of the data.

    Returns:
        Indices, int64 [batch].

    Raises:
        ValueError: a negative position or batch, or no pairs.
    """
    if position < 0 or batch < 0 or num_pairs < 1:
        raise ValueError(f"position {position}, batch {batch} or num_pairs {num_pairs} is out of range")
    return _look_up(np.arange(position, position + batch, dtype=np.int64), num_pairs, (seed,), shuffle)


def blended_order(
    position: int, batch: int, sizes: Sequence[int], counts: Sequence[int], seed: int, shuffle: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs at positions [position, position + batch) of the endless order of a blend.

    Epoch e has sum(counts) positions, and source s is at counts[s] of them, drawn from (seed, e). There it gives the
    pairs [e * counts[s], (e + 1) * counts[s]) of its own endless order, which is that of `pairs_of_batch` with another
    seed. So no pair of a source comes again before all sizes[s] pairs have come.

    Args:
        position: of the first pair.
        batch: number of pairs.
        sizes: pairs of each source.
        counts: pairs that each source gives to an epoch.
        seed: of the shuffling.
        shuffle: False: sources and pairs are in the order of the data.

    Returns:
        The sources, and the indices within them, int64 [batch] each.

    Raises:
        ValueError: a negative position or batch, or a source without pairs.
    """
    if position < 0 or batch < 0 or min(sizes) < 1:
        raise ValueError(f"position {position}, batch {batch} or sizes {sizes} is out of range")
    total = sum(counts)
    positions = np.arange(position, position + batch, dtype=np.int64)
    slots, epochs = _look_up(positions, total, (seed,), shuffle), positions // total
    starts = np.cumsum([0, *counts])
    source = np.searchsorted(starts, slots, side="right") - 1
    indices = np.empty_like(slots)
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        here = source == number
        indices[here] = _look_up(epochs[here] * count + slots[here] - starts[number], size, (seed, number + 1), shuffle)
    return source, indices


def _look_up(positions: np.ndarray, num_pairs: int, seed: tuple[int, ...], shuffle: bool) -> np.ndarray:
    """Looks up positions in an endless order: epoch after epoch, each a seeded permutation of range(num_pairs).

    Args:
        positions: int64, of any shape.
        num_pairs: in an epoch.
        seed: with the number of the epoch, the seed of its permutation.
        shuffle: False: every epoch is range(num_pairs).

    Returns:
        int64, of the shape of positions.
    """
    epochs, indices = np.divmod(positions, num_pairs)
    if shuffle:
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(num_pairs, seed, int(epoch))[indices[here]]
    return indices


@lru_cache(maxsize=8)
def _permutation(num_pairs: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*seed, epoch)))).permutation(num_pairs)
    if num_pairs < 2**31:
        order = order.astype(np.int32)  # 40 MB for 10 million pairs
    order.setflags(write=False)
    return order
