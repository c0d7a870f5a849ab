"""The order of the data and the packing of a batch: pure functions, so resuming needs a position and nothing else."""

from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np


def pairs_of_batch(position: int, batch: int, num_pairs: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Indices int64 [batch] of the pairs at positions [position, position + batch) of the endless data order.

    Epoch e is positions [e * num_pairs, (e + 1) * num_pairs), a permutation of all pairs drawn from (seed, e); a batch
    may straddle epochs. Raises ValueError for a negative position or no pairs.
    """
    if position < 0 or batch < 0 or num_pairs < 1:
        raise ValueError(f"position {position}, batch {batch} or num_pairs {num_pairs} is out of range")
    positions = np.arange(position, position + batch, dtype=np.int64)
    epochs, indices = np.divmod(positions, num_pairs)
    if shuffle:
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(num_pairs, seed, int(epoch))[indices[here]]
    return indices


@lru_cache(maxsize=4)
def _permutation(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch)))).permutation(num_pairs)
    order.setflags(write=False)
    return order


def pack_rows(lengths: np.ndarray, seq_length: int) -> list[list[int]]:
    """Pack whole pairs into rows of at most `seq_length` tokens, best fit decreasing.

    lengths: int [n], tokens of each pair. Returns the positions into `lengths` of each row. Raises ValueError for a
    pair longer than a row.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > seq_length:
        longest = int(lengths.argmax())
        raise ValueError(f"pair {longest} has {lengths[longest]} tokens, a row has {seq_length}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for pair in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[pair])
        fit = bisect_left(room, (length, -1))
        if fit < len(room):
            free, row = room.pop(fit)
        else:
            free, row = seq_length, len(rows)
            rows.append([])
        rows[row].append(pair)
        insort(room, (free - length, row))
    return rows


def plan_batch(
    lengths: np.ndarray, seq_length: int, data_parallel_size: int, microbatch_multiple: int = 1
) -> list[list[list[int]]]:
    """The packs of a batch: plan[dp_rank][microbatch] is a list of positions into `lengths`.

    Every rank gets the same number of microbatches, a positive multiple of `microbatch_multiple`; those it has no pairs
    for are empty lists, at the end. Rows are dealt longest first, back and forth over the ranks, so the k-th
    microbatches of all ranks are alike in tokens and so are the ranks' sums. Raises ValueError as `pack_rows` does.
    """
    lengths = np.asarray(lengths)
    rows = sorted(pack_rows(lengths, seq_length), key=lambda row: -int(lengths[row].sum()))
    plan: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for i, row in enumerate(rows):
        turn, place = divmod(i, data_parallel_size)
        plan[place if turn % 2 == 0 else data_parallel_size - 1 - place].append(row)
    per_rank = max(1, -(-len(rows) // data_parallel_size))
    per_rank = -(-per_rank // microbatch_multiple) * microbatch_multiple
    return [packs + [[] for _ in range(per_rank - len(packs))] for packs in plan]
