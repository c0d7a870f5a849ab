"""Which pairs of a global batch stand in which row of which rank: a pure function of their lengths.

A row takes whole pairs. As few rows are used as best fit decreasing needs, the same number on every data-parallel rank; the
pairs are then spread over them so that all rows cost alike, because ranks wait for each other at every step and pipeline stages
at every row. The cost of a sequence of L tokens is taken as

    L + L^2 / (12 * hidden_size)

the matrix products and the causal attention of a transformer layer (24 h^2 and 2 L h floating-point operations a token, h the
hidden size).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np


def pair_costs(
    prompt: np.ndarray, responses: Sequence[np.ndarray], hidden_size: int, shared: bool = False
) -> np.ndarray:
    """Estimated cost float64 [n] of pairs, in tokens of a linear layer.

    prompt: int [n] tokens; responses: int [n] tokens of each member; shared: the prompt is computed once.
    """
    again = (len(responses) - 1) * prompt.astype(np.float64) if shared else np.zeros(len(prompt))
    sequences = [prompt.astype(np.float64) + response for response in responses]
    squares = sum((length**2 for length in sequences), start=np.zeros(len(prompt)))
    squares -= again * prompt
    return sum(sequences, start=-again) + squares / (12 * hidden_size)


def pack_rows(lengths: np.ndarray, seq_length: int) -> list[list[int]]:
    """Pack whole pairs into rows of at most `seq_length` tokens: best fit decreasing, or an even spread if that is optimal.

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
    fewest = -(-int(lengths.sum()) // seq_length)
    return (len(rows) > fewest and _spread(lengths, lengths, seq_length, fewest)) or rows


def pack_batch(
    lengths: np.ndarray,
    seq_length: int,
    data_parallel_size: int,
    microbatch_multiple: int = 1,
    costs: np.ndarray | None = None,
) -> list[list[list[int]]]:
    """The packs of a batch: plan[dp_rank][microbatch] is a list of positions into `lengths`.

    lengths: int [n], tokens of each pair; costs: float [n], by default the lengths. Every rank gets the same number of
    microbatches, a positive multiple of `microbatch_multiple`; those it has no pairs for are empty lists, at the end.
    Rows are dealt dearest first, back and forth over the ranks, so the k-th microbatches of all ranks cost alike and so
    do the ranks' sums. Raises ValueError as `pack_rows` does.
    """
    lengths = np.asarray(lengths)
    costs = lengths.astype(np.float64) if costs is None else np.asarray(costs, np.float64)
    fewest = pack_rows(lengths, seq_length)
    ranks = data_parallel_size
    per_rank = max(1, -(-len(fewest) // ranks))
    per_rank = -(-per_rank // microbatch_multiple) * microbatch_multiple
    rows = _spread(lengths, costs, seq_length, ranks * per_rank) or fewest
    rows = sorted((row for row in rows if row), key=lambda row: -costs[row].sum())
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for i, row in enumerate(rows):
        turn, place = divmod(i, ranks)
        plan[place if turn % 2 == 0 else ranks - 1 - place].append(row)
    return [packs + [[] for _ in range(per_rank - len(packs))] for packs in plan]


def _spread(lengths: np.ndarray, costs: np.ndarray, seq_length: int, num_rows: int) -> list[list[int]] | None:
    """`num_rows` rows of like cost: the dearest pair left goes to the cheapest row it fits; None where it fits none."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room = [seq_length] * num_rows
    cheapest = [(0.0, row) for row in range(num_rows)]
    heapify(cheapest)
    for pair in np.argsort(-costs, kind="stable").tolist():
        full = []
        while cheapest and room[cheapest[0][1]] < lengths[pair]:
            full.append(heappop(cheapest))
        if not cheapest:
            return None
        cost, row = heappop(cheapest)
        rows[row].append(pair)
        room[row] -= int(lengths[pair])
        heappush(cheapest, (cost + float(costs[pair]), row))
        for entry in full:
            heappush(cheapest, entry)
    return rows
