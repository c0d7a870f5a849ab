"""Which tokens of a packed row a context-parallel rank holds: the zig-zag slices of Transformer Engine.

Every sequence is cut into 2 * CP chunks of equal length; rank r holds chunks r and 2 * CP - 1 - r, so that causal attention
costs the same on all ranks. With CP = 2 and a sequence of 8 tokens, rank 0 holds tokens 0 1 6 7 and rank 1 tokens 2 3 4 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np


def round_up(size: Any, multiple: int) -> Any:
    """The next multiple, of a number or of each number of an array."""
    return -(-size // multiple) * multiple


def sequence_multiple(size: int) -> int:
    """What the length of every sequence of a row is a multiple of under context parallelism of `size` ranks."""
    return 2 * size if size > 1 else 1


def chunks(start: int, stop: int, size: int, rank: int) -> tuple[slice, slice]:
    """The two slices of the row [start, stop) that rank `rank` of `size` holds; the length is a multiple of 2 * size."""
    length = (stop - start) // (2 * size)
    first, second = start + rank * length, start + (2 * size - 1 - rank) * length
    return slice(first, first + length), slice(second, second + length)


def positions(offsets: Sequence[int], size: int, rank: int) -> np.ndarray:
    """Positions in the row of the tokens a rank holds, in its order: int64 [offsets[-1] / size].

    Args:
        offsets: where the sequences start, and the end of the last; with more than one rank each length is a multiple of
            2 * size.
        size, rank: of context parallelism.
    """
    if size == 1:
        return np.arange(offsets[-1])
    rows = (chunks(start, stop, size, rank) for start, stop in pairwise(offsets))
    return np.concatenate([np.arange(piece.start, piece.stop) for pieces in rows for piece in pieces])
