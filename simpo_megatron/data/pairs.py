"""Tokenized pairs by index: in memory, mapped from disk (`prepared_set.py`), or several sources as one blend.

A pair is three arrays of token ids (prompt, chosen and rejected response) and one number in each of the `COLUMNS`. P is
the number of pairs.
"""

from __future__ import annotations

import copy
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simpo_megatron.data.order import blended_order, pairs_of_batch

CHOSEN_CUT, REJECTED_CUT = 1, 2  # bits of the column `truncated`


@dataclass(frozen=True)
class Column:
    """One number a pair.

    Attributes:
        name: of the column.
        dtype: NumPy's name of its type, byte order included, as a prepared set stores it.
        default: where neither the source nor an older prepared set has the number.
        meaning: of the number.
    """

    name: str
    dtype: str
    default: float
    meaning: str


# The only list of them: to add a column, append it here and fill it in `clean._pairs`. The order is that of the records
# of a prepared set, so a column is never moved or removed.
COLUMNS = (
    Column("row", "<i8", 0, "row of the source, from 1; 0 where the source does not number its rows"),
    Column("weight", "<f4", 1.0, "factor of the pair's loss"),
    Column("margin", "<f4", math.nan, "target reward margin of the pair; NaN: that of the objective"),
    Column("score_chosen", "<f4", math.nan, "score of the chosen response; NaN: the source has none"),
    Column("score_rejected", "<f4", math.nan, "score of the rejected response; NaN: the source has none"),
    Column("truncated", "u1", 0, "CHOSEN_CUT and REJECTED_CUT: the response was cut and lost its EOS"),
    Column("prompt_cut", "u1", 0, "1: the prompt was cut"),
    Column("ref_chosen_logps", "<f4", math.nan, "summed log-prob of the chosen response under a reference; NaN: none"),
    Column("ref_rejected_logps", "<f4", math.nan, "the same for the rejected response"),
)
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
Numbers = Any  # an array [P], or what an index array or a slice reads like one


def all_columns(count: int, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every column of `count` pairs.

    Args:
        count: P.
        given: the numbers of some columns, each [P]; arrays of the column's type are not copied.

    Returns:
        An array [P] of each of `COLUMNS`. Columns that were not given hold their default and take no memory.
    """
    return {
        column.name: np.asarray(given[column.name], column.dtype)
        if column.name in given
        else np.broadcast_to(np.array(column.default, column.dtype), count)
        for column in COLUMNS
    }


class Pairs(ABC):
    """P pairs.

    Attributes:
        prompt_length: int32 [P], tokens.
        chosen_length: int32 [P], tokens with EOS.
        rejected_length: int32 [P], tokens with EOS.
        columns: [P] each, by the names of `COLUMNS`.
    """

    prompt_length: Numbers
    chosen_length: Numbers
    rejected_length: Numbers
    columns: Mapping[str, Numbers]

    def __len__(self) -> int:
        return len(self.prompt_length)

    @abstractmethod
    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The prompt, the chosen and the rejected response of pair i, int32 each. They must not be written to."""

    @property
    @abstractmethod
    def fingerprint(self) -> int:
        """32 bits that change with the ids. A resumed run compares them."""

    @property
    @abstractmethod
    def largest_token(self) -> int:
        """The largest id of all."""

    @property
    @abstractmethod
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one response."""

    def order(self, position: int, batch: int, seed: int, shuffle: bool = True) -> np.ndarray:
        """Indices int64 [batch] at positions [position, position + batch) of the endless order of these pairs."""
        return pairs_of_batch(position, batch, len(self), seed, shuffle)

    def reference_sums(self, indices: np.ndarray) -> np.ndarray:
        """Summed log-probs under a reference model, float32 [len(indices), 2], chosen first; NaN: there are none."""
        return np.stack([self.columns[name][indices] for name in REFERENCE], axis=1).astype(np.float32)

    def with_reference_sums(self, sums_PM: np.ndarray) -> Pairs:
        """A view of these pairs that carries log-probs of a reference model, for objectives that compare with one.

        Args:
            sums_PM: summed log-probs of the responses, float32 [P, 2], chosen first; `trainer.scoring` computes them.
        """
        pairs = copy.copy(self)
        columns = {**self.columns, **dict(zip(REFERENCE, sums_PM.T, strict=True))}
        object.__setattr__(pairs, "columns", columns)  # the class may be frozen
        return pairs

    @property
    def pair_tokens(self) -> np.ndarray:
        """int64 [P]: tokens of each pair once packed, with the prompt before both responses."""
        return 2 * self.prompt_length[:].astype(np.int64) + self.chosen_length[:] + self.rejected_length[:]


@dataclass(frozen=True, eq=False)
class InMemoryPairs(Pairs):
    """Pairs in memory.

    Attributes:
        tokens: int32, prompt, chosen and rejected response of the first pair, then those of the next.
        offsets: int64 [P + 1]; tokens[offsets[i] : offsets[i + 1]] is pair i.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_length: np.ndarray
    chosen_length: np.ndarray
    rejected_length: np.ndarray
    columns: Mapping[str, np.ndarray]

    @classmethod
    def build(cls, tokens: np.ndarray, lengths: np.ndarray, given: Mapping[str, Any]) -> InMemoryPairs:
        """Pairs from ids one after the other.

        Args:
            tokens: int32, as in `InMemoryPairs`.
            lengths: int32 [P, 3], tokens of prompt, chosen and rejected response.
            given: numbers of columns; the others hold their default.
        """
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        prompt, chosen, rejected = np.ascontiguousarray(lengths.T)
        return cls(tokens, offsets, prompt, chosen, rejected, all_columns(len(lengths), given))

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Pairs`."""
        tokens = self.tokens[self.offsets[i] : self.offsets[i + 1]]
        chosen_at = self.prompt_length[i]
        rejected_at = chosen_at + self.chosen_length[i]
        return tokens[:chosen_at], tokens[chosen_at:rejected_at], tokens[rejected_at:]

    @property
    def fingerprint(self) -> int:
        """See `Pairs`."""
        return zlib.crc32(self.tokens.data)

    @property
    def largest_token(self) -> int:
        """See `Pairs`."""
        return int(self.tokens.max())

    @property
    def longest_sequence(self) -> int:
        """See `Pairs`."""
        return int((self.prompt_length + np.maximum(self.chosen_length, self.rejected_length)).max())

    def take(self, keep: np.ndarray) -> InMemoryPairs:
        """The pairs where `keep`, bool [P], is true."""
        lengths = np.stack([self.prompt_length, self.chosen_length, self.rejected_length], axis=1)
        tokens = self.tokens[np.repeat(keep, np.diff(self.offsets))]
        return self.build(tokens, lengths[keep], {name: numbers[keep] for name, numbers in self.columns.items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, columns among them: what is sent to other ranks."""
        own = {name: value for name, value in vars(self).items() if name != "columns"}
        return {**own, **self.columns}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> InMemoryPairs:
        """The pairs that `arrays` was called on."""
        columns = {column.name: arrays[column.name] for column in COLUMNS}
        own = {name: array for name, array in arrays.items() if name not in columns}
        return cls(**own, columns=columns)


def concatenate(parts: Sequence[InMemoryPairs]) -> InMemoryPairs:
    """The pairs of all parts, in order."""
    every = [part.arrays() for part in parts]
    arrays = {name: np.concatenate([part[name] for part in every]) for name in every[0]}
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    shifted = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    arrays["offsets"] = np.concatenate([np.zeros(1, np.int64), *shifted])
    return InMemoryPairs.from_arrays(arrays)


class BlendedPairs(Pairs):
    """The pairs of several sources, one source after the other. An epoch has as many pairs as all sources together.

    Without weights an epoch has every pair once. With weights each source gives its share of every epoch. The share is
    taken from an endless order of the source's own, so no pair comes again before all pairs of that source have come.

    Attributes:
        parts: the sources.
        starts: int64 [sources + 1], index of the first pair of each source.
        weights: of the sources, or None.
        counts: int64 [sources], pairs that each source gives to an epoch.
    """

    def __init__(self, parts: Sequence[Pairs], weights: Sequence[float] | None = None) -> None:
        """Joins sources.

        Args:
            parts: the sources.
            weights: one a source; only their proportion counts.

        Raises:
            ValueError: a weight is too small for a single pair of an epoch.
        """
        self.parts, self.weights = list(parts), weights
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        for name in ("prompt_length", "chosen_length", "rejected_length"):
            setattr(self, name, _Joined([getattr(part, name) for part in parts], self.starts))
        self.columns = {
            column.name: _Joined([part.columns[column.name] for part in parts], self.starts) for column in COLUMNS
        }
        sizes = np.diff(self.starts)
        self.counts = sizes if weights is None else _shares(np.asarray(weights, np.float64), int(self.starts[-1]))
        if not self.counts.all():
            raise ValueError(f"weights {weights} leave a source no pair of an epoch of {self.starts[-1]}")

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Pairs`."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part].pair(int(i - self.starts[part]))

    @property
    def fingerprint(self) -> int:
        """See `Pairs`."""
        return zlib.crc32(repr([self.counts.tolist(), *(part.fingerprint for part in self.parts)]).encode())

    @property
    def largest_token(self) -> int:
        """See `Pairs`."""
        return max(part.largest_token for part in self.parts)

    @property
    def longest_sequence(self) -> int:
        """See `Pairs`."""
        return max(part.longest_sequence for part in self.parts)

    def order(self, position: int, batch: int, seed: int, shuffle: bool = True) -> np.ndarray:
        """See `Pairs`."""
        sizes = np.diff(self.starts)
        source, indices = blended_order(position, batch, sizes.tolist(), self.counts.tolist(), seed, shuffle)
        return self.starts[source] + indices


class _Joined:
    """The numbers of several sources, one source after the other. Only what is asked for is read."""

    def __init__(self, parts: Sequence[Numbers], starts: np.ndarray) -> None:
        self.parts, self.starts = parts, starts

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:
        index = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        source = np.searchsorted(self.starts, index, side="right") - 1
        found = np.empty(index.shape, np.asarray(self.parts[0][:1]).dtype)
        for number, part in enumerate(self.parts):
            here = source == number
            found[here] = part[index[here] - self.starts[number]]
        return found


def _shares(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to `total`, in the proportion of the weights, by largest remainder."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts
