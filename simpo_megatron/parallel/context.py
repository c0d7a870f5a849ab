"""Which tokens of a packed row a context-parallel rank holds: the zig-zag slices of Transformer Engine.

Every sequence is cut into 2 * CP slices of equal length. Rank r holds the slices r and 2 * CP - 1 - r, so that causal
attention costs the same on all ranks. With CP = 2 and a sequence of 8 tokens, rank 0 holds the tokens 0 1 6 7 and rank
1 the tokens 2 3 4 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np


def round_up(size: Any, multiple: int) -> Any:
    """The next multiple, for a number or for each number of an array.

    >>> round_up(9, 4)
    12
    """
    return -(-size // multiple) * multiple


def sequence_multiple(size: int) -> int:
    """The number that divides the length of every sequence of a row, with `size` context-parallel ranks."""
    return 2 * size if size > 1 else 1


def zigzag_slices(start: int, stop: int, size: int, rank: int) -> tuple[slice, slice]:
    """The two slices of the sequence [start, stop) that rank `rank` of `size` holds; 2 * size divides its length."""
    length = (stop - start) // (2 * size)
    first, second = start + rank * length, start + (2 * size - 1 - rank) * length
    return slice(first, first + length), slice(second, second + length)


def positions(offsets: Sequence[int], size: int, rank: int) -> np.ndarray:
    """Where the tokens of a rank stand in the row.

    Args:
        offsets: where the sequences start, and the end of the last. With more than one rank 2 * size divides each
            length.
        size: context-parallel ranks.
        rank: this one.

    Returns:
        int64 [offsets[-1] / size], in the order of the rank's own tokens.
    """
    if size == 1:
        return np.arange(offsets[-1])
    sequences = (zigzag_slices(start, stop, size, rank) for start, stop in pairwise(offsets))
    return np.concatenate([np.arange(piece.start, piece.stop) for pieces in sequences for piece in pieces])
