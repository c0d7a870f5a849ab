"""The order of the data: a pure function, so resuming needs a position and nothing else."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def pairs_of_batch(position: int, batch: int, num_pairs: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Indices int64 [batch] of the pairs at positions [position, position + batch) of the endless data order.

    Epoch e is positions [e * num_pairs, (e + 1) * num_pairs), a permutation of all pairs drawn from (seed, e); a batch
    may straddle epochs. Raises ValueError for a negative position or no pairs.
    """
    if position < 0 or batch < 0 or num_pairs < 1:
        raise ValueError(f"position {position}, batch {batch} or num_pairs {num_pairs} is out of range")
    return _look_up(np.arange(position, position + batch, dtype=np.int64), num_pairs, (seed,), shuffle)


def blended_order(
    position: int, batch: int, sizes: Sequence[int], counts: Sequence[int], seed: int, shuffle: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Sources and indices within them, both int64 [batch], at positions [position, position + batch).

    Epoch e has sum(counts) positions. Source s stands at counts[s] of them, drawn from (seed, e), and gives the pairs
    [e * counts[s], (e + 1) * counts[s]) of its own endless order, that of `pairs_of_batch` under another seed: a source of
    sizes[s] pairs repeats none before all of them were seen. Raises ValueError for a negative position or no pairs.
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
    """What stands at any positions of an endless sequence of permutations of num_pairs: int64, the shape of positions."""
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
        order = order.astype(np.int32)  # of 10 million pairs 40 MB
    order.setflags(write=False)
    return order
