"""Which pairs of a global batch are in which packed row of which rank: a pure function of their lengths.

A packed row takes whole pairs. There are as few rows as best fit decreasing needs, and the same number on every
data-parallel rank. The pairs are then spread over the rows so that all rows cost about the same, because ranks wait for
each other at every step and pipeline stages at every row. The cost of a sequence of L tokens is estimated as

    L + L^2 / (12 * hidden_size)

which stands for the matrix products and the causal attention of a transformer layer: 24 h^2 and 2 L h floating-point
operations a token, where h is the hidden size.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np


def pair_costs(
    prompt: np.ndarray, responses: Sequence[np.ndarray], hidden_size: int, shared: bool = False
) -> np.ndarray:
    """Estimated cost of pairs.

    Args:
        prompt: int [n], tokens of the prompts.
        responses: int [n] each, tokens of the responses that are scored.
        hidden_size: of the model.
        shared: the prompt of a pair is computed once.

    Returns:
        float64 [n], in tokens of a linear layer.
    """
    again = (len(responses) - 1) * prompt.astype(np.float64) if shared else np.zeros(len(prompt))
    sequences = [prompt.astype(np.float64) + response for response in responses]
    squares = sum((length**2 for length in sequences), start=np.zeros(len(prompt)))
    squares -= again * prompt
    return sum(sequences, start=-again) + squares / (12 * hidden_size)


def pack_rows(lengths: np.ndarray, seq_length: int) -> list[list[int]]:
    """Packs whole pairs into rows, by best fit decreasing, or by an even spread where only that needs the fewest rows.

    Args:
        lengths: int [n], tokens of each pair.
        seq_length: most tokens of a row.

    Returns:
        For each row, the positions of its pairs in `lengths`.

    Raises:
        ValueError: a pair is longer than a row.
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
    """Packs a global batch into the microbatches of all ranks; a microbatch is one packed row.

    Every rank gets the same number of microbatches. Where there are too few pairs, its last ones are empty lists. Rows
    go to the ranks in order of falling cost, forth and back over the ranks, so the k-th microbatches of all ranks cost
    about the same, and so do the sums of the ranks.

    Args:
        lengths: int [n], tokens of each pair.
        seq_length: most tokens of a row.
        data_parallel_size: number of ranks.
        microbatch_multiple: the number of microbatches of a rank is a multiple of it.
        costs: float [n], of each pair; None: the lengths.

    Returns:
        Positions in `lengths`: result[rank][microbatch] is a list of them.

    Raises:
        ValueError: a pair is longer than a row.
    """
    lengths = np.asarray(lengths)
    costs = lengths.astype(np.float64) if costs is None else np.asarray(costs, np.float64)
    fewest = pack_rows(lengths, seq_length)
    ranks = data_parallel_size
    per_rank = max(1, -(-len(fewest) // ranks))
    per_rank = -(-per_rank // microbatch_multiple) * microbatch_multiple
    rows = _spread(lengths, costs, seq_length, ranks * per_rank) or fewest
    rows = sorted((row for row in rows if row), key=lambda row: -costs[row].sum())
    of_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    for i, row in enumerate(rows):
        turn, place = divmod(i, ranks)
        of_rank[place if turn % 2 == 0 else ranks - 1 - place].append(row)
    return [microbatches + [[] for _ in range(per_rank - len(microbatches))] for microbatches in of_rank]


def _spread(lengths: np.ndarray, costs: np.ndarray, seq_length: int, num_rows: int) -> list[list[int]] | None:
    """`num_rows` rows of about the same cost: pairs in order of falling cost go to the cheapest row with room.

    Returns:
        As `pack_rows`; None where a pair finds no row with room.
    """
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


def packing_figures(lengths: np.ndarray, seq_length: int, batch: int = 128) -> dict[str, float]:
    """What packing does to pairs in their order, one global batch after the other.

    Args:
        lengths: int [P, 3], tokens of prompt, chosen and rejected response.
        seq_length: most tokens of a row. A longer pair is counted as a full row.
        batch: pairs of a global batch.

    Returns:
        By name: `pairs`; `tokens`, prompts counted twice; `rows` and `fewest_rows`, the least that can hold the tokens;
        `tokens_per_row`; `padding_packed`, the share of all positions of rows of `seq_length`; `padding_unpacked`, the
        share where the sequences of every four pairs are padded to the longest of them; `saved_by_shared_prompts`, the
        share of tokens. Nothing without pairs.
    """
    if not len(lengths):
        return {}
    sequences = np.stack([lengths[:, 0] + lengths[:, 1], lengths[:, 0] + lengths[:, 2]], axis=1)
    pairs = sequences.sum(axis=1)
    fit = np.minimum(pairs, seq_length)
    rows = sum(len(pack_rows(fit[start : start + batch], seq_length)) for start in range(0, len(fit), batch))
    padded = sum(
        sequences[start : start + 4].max() * sequences[start : start + 4].size for start in range(0, len(sequences), 4)
    )
    tokens = int(pairs.sum())
    return {
        "pairs": len(pairs),
        "tokens": tokens,
        "rows": rows,
        "fewest_rows": sum(
            -(-int(fit[start : start + batch].sum()) // seq_length) for start in range(0, len(fit), batch)
        ),
        "tokens_per_row": int(fit.sum()) / rows,
        "padding_packed": 1 - int(fit.sum()) / (rows * seq_length),
        "padding_unpacked": 1 - tokens / float(padded),
        "saved_by_shared_prompts": float(lengths[:, 0].sum()) / tokens,
    }
