"""How likelihood and reward depend on the length of a response. NumPy alone.

    spearman(averages, lengths)                              # does the model like long responses?
    by_length_difference(margins, differences)               # is the margin that of the longer response?

Evaluations and `tools/diagnose.py` report both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation. Equal values share the mean of their ranks.

    Args:
        first: [N] numbers.
        second: [N] numbers.

    Returns:
        Between -1 and 1; NaN where all values of one are equal, or a value is not finite.
    """
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    ranks = np.stack([_ranks(first), _ranks(second)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt(np.square(ranks).sum(axis=1))
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 0; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[places]


@dataclass(frozen=True)
class Bin:
    """Pairs with similar differences of their lengths.

    Attributes:
        number: from 1, the bin of the pairs whose chosen response is shortest beside the rejected one.
        shortest: the smallest difference in the bin: tokens of the chosen response minus those of the rejected one.
        longest: the largest difference in the bin.
        pairs: how many pairs.
        margin: their mean reward margin.
    """

    number: int
    shortest: int
    longest: int
    pairs: int
    margin: float


def by_length_difference(margins: np.ndarray, differences: np.ndarray, bins: int = 5) -> list[Bin]:
    """The mean margin of the pairs in bins of about as many pairs each, by the difference of their lengths.

    Args:
        margins: [P] reward of the chosen response minus that of the rejected one.
        differences: [P] tokens of the chosen response minus those of the rejected one.
        bins: how many, at most. Pairs of equal difference are in one bin, so some may be left out.
    """
    edges = np.quantile(differences, np.arange(1, bins) / bins, method="inverted_cdf")
    numbers = np.searchsorted(edges, differences)
    return [
        Bin(
            int(number) + 1,
            int(differences[here].min()),
            int(differences[here].max()),
            int(here.sum()),
            float(margins[here].mean(dtype=np.float64)),
        )
        for number in np.unique(numbers)
        for here in [numbers == number]
    ]
