"""Tokenized pairs by index: in memory, mapped from disk (`prepared.py`) or blended of several sources.

Whatever holds them, a pair is three arrays of ids (prompt, chosen, rejected) and a place in columns of numbers. P pairs.
"""

from __future__ import annotations

import copy
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from simpo_megatron.data.order import blended_order, pairs_of_batch

CHOSEN_CUT, REJECTED_CUT = 1, 2


Column = Any
"""One number a pair: an array [P], or what answers an index array or a slice as one does."""


class Pairs(ABC):
    """P pairs."""

    prompt_length: Column
    """int32 [P]"""
    chosen_length: Column
    """int32 [P], EOS included"""
    rejected_length: Column
    """int32 [P], EOS included"""
    weight: Column
    """float32 [P]"""
    margin: Column
    """float32 [P]; NaN: the pair uses gamma"""
    truncated: Column
    """uint8 [P]; CHOSEN_CUT and REJECTED_CUT where a response was cut and lost its EOS"""

    def __len__(self) -> int:
        return len(self.prompt_length)

    @abstractmethod
    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt, chosen, rejected) of pair i, int32; not to be written to."""

    @property
    @abstractmethod
    def fingerprint(self) -> int:
        """32 bits that change with the ids: what a resumed run compares."""

    @property
    @abstractmethod
    def largest_token(self) -> int:
        """The largest id of all."""

    @property
    @abstractmethod
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one response."""

    def order(self, position: int, batch: int, seed: int, shuffle: bool = True) -> np.ndarray:
        """Indices int64 [batch] at positions [position, position + batch) of the endless order of this set."""
        return pairs_of_batch(position, batch, len(self), seed, shuffle)

    reference_sums: np.ndarray | None = None  # float32 [P, M], see `with_reference_sums`

    def with_reference_sums(self, sums_PM: np.ndarray) -> Pairs:
        """A view of these pairs that carries log-probs of a reference model, for objectives that compare with one.

        Args:
            sums_PM: summed log-probs of the responses, float32 [P, M], chosen first; `trainer.scoring.score_pairs`
                computes them.
        """
        pairs = copy.copy(self)
        object.__setattr__(pairs, "reference_sums", sums_PM)  # the class may be frozen
        return pairs

    @property
    def pair_tokens(self) -> np.ndarray:
        """int64 [P]: tokens of each pair once packed, with the prompt before both responses."""
        return 2 * self.prompt_length[:].astype(np.int64) + self.chosen_length[:] + self.rejected_length[:]


@dataclass(frozen=True, eq=False)
class InMemoryPairs(Pairs):
    """Pairs in memory. The tokens of pair i are tokens[offsets[i] : offsets[i + 1]]: prompt, chosen, rejected."""

    tokens: np.ndarray
    """int32 [sum of lengths]"""
    offsets: np.ndarray
    """int64 [P + 1]"""
    prompt_length: np.ndarray
    chosen_length: np.ndarray
    rejected_length: np.ndarray
    weight: np.ndarray
    margin: np.ndarray
    truncated: np.ndarray

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = self.tokens[self.offsets[i] : self.offsets[i + 1]]
        chosen_at = self.prompt_length[i]
        rejected_at = chosen_at + self.chosen_length[i]
        return tokens[:chosen_at], tokens[chosen_at:rejected_at], tokens[rejected_at:]

    @property
    def fingerprint(self) -> int:
        return zlib.crc32(self.tokens.data)

    @property
    def largest_token(self) -> int:
        return int(self.tokens.max())

    @property
    def longest_sequence(self) -> int:
        return int((self.prompt_length + np.maximum(self.chosen_length, self.rejected_length)).max())

    def take(self, keep: np.ndarray) -> InMemoryPairs:
        """The pairs where `keep`, bool [P], holds."""
        lengths = np.diff(self.offsets)
        arrays = {name: array[keep] for name, array in self.arrays().items() if name not in ("tokens", "offsets")}
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[keep])])
        return InMemoryPairs(tokens=self.tokens[np.repeat(keep, lengths)], offsets=offsets, **arrays)

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name, for sending to other ranks."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> InMemoryPairs:
        """The store whose `arrays()` these are."""
        return cls(**arrays)


def concatenate(parts: Sequence[InMemoryPairs]) -> InMemoryPairs:
    """The pairs of all parts, in order."""
    arrays = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in parts[0].arrays()}
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    shifted = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    arrays["offsets"] = np.concatenate([np.zeros(1, np.int64), *shifted])
    return InMemoryPairs.from_arrays(arrays)


class BlendedPairs(Pairs):
    """Several sources, one after the other; an epoch draws as many pairs as there are, in the proportion of `weights`.

    Without weights that is every pair once. With them a source gives its share of every epoch from an endless order of its
    own, so it repeats no pair before all of its pairs were seen.
    """

    def __init__(self, parts: Sequence[Pairs], weights: Sequence[float] | None = None) -> None:
        """Raises ValueError where a weight is too small for a single pair of an epoch."""
        self.parts, self.weights = list(parts), weights
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        for name in ("prompt_length", "chosen_length", "rejected_length", "weight", "margin", "truncated"):
            setattr(self, name, _Joined([getattr(part, name) for part in parts], self.starts))
        sizes = np.diff(self.starts)
        self.counts = sizes if weights is None else _shares(np.asarray(weights, np.float64), int(self.starts[-1]))
        if not self.counts.all():
            raise ValueError(f"weights {weights} leave a source no pair of an epoch of {self.starts[-1]}")

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part].pair(int(i - self.starts[part]))

    @property
    def fingerprint(self) -> int:
        return zlib.crc32(repr([self.counts.tolist(), *(part.fingerprint for part in self.parts)]).encode())

    @property
    def largest_token(self) -> int:
        return max(part.largest_token for part in self.parts)

    @property
    def longest_sequence(self) -> int:
        return max(part.longest_sequence for part in self.parts)

    def order(self, position: int, batch: int, seed: int, shuffle: bool = True) -> np.ndarray:
        sizes = np.diff(self.starts)
        source, indices = blended_order(position, batch, sizes.tolist(), self.counts.tolist(), seed, shuffle)
        return self.starts[source] + indices


class _Joined:
    """Columns one after the other."""

    def __init__(self, columns: Sequence[Column], starts: np.ndarray) -> None:
        self.columns, self.starts = columns, starts

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:
        index = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        part = np.searchsorted(self.starts, index, side="right") - 1
        found = np.empty(index.shape, np.asarray(self.columns[0][:1]).dtype)
        for number, column in enumerate(self.columns):
            here = part == number
            found[here] = column[index[here] - self.starts[number]]
        return found


def _shares(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to `total`, in the proportion of the weights, by largest remainder."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts
