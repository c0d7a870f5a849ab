"""Tokenized pairs of random ids, made without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simpo_megatron.data import InMemoryPairs


def make_pairs(
    lengths: Sequence[tuple[int, int, int]],
    *,
    vocab_size: int = 50,
    seed: int = 0,
    planted: Sequence[int] = (),
    **columns: Sequence[float],
) -> InMemoryPairs:
    """Pairs of random ids. The first token of every chosen response has id 0, as padding has.

    Args:
        lengths: (prompt, chosen, rejected) tokens of each pair.
        vocab_size: ids are below it.
        seed: of the ids.
        planted: ids that the longest chosen response begins with.
        columns: numbers of `COLUMNS`, one a pair; the others hold their default.
    """
    sizes = np.array(lengths, np.int32).reshape(-1, 3)
    offsets = np.concatenate(([0], np.cumsum(sizes.sum(axis=1, dtype=np.int64))))
    tokens = np.random.default_rng(seed).integers(1, vocab_size, offsets[-1], dtype=np.int32)
    tokens[offsets[:-1] + sizes[:, 0]] = 0
    longest = int(sizes[:, 1].argmax())
    start = offsets[longest] + sizes[longest, 0]
    tokens[start : start + len(planted)] = planted
    return InMemoryPairs.build(tokens, sizes, columns)
