"""Tokenized pairs of random ids, made without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simpo_megatron.data import InMemoryPairs


def make_store(
    lengths: Sequence[tuple[int, int, int]],
    *,
    vocab_size: int = 50,
    seed: int = 0,
    weight: Sequence[float] | None = None,
    margin: Sequence[float] | None = None,
    truncated: Sequence[int] | None = None,
    planted: Sequence[int] = (),
) -> InMemoryPairs:
    """Pairs of (prompt, chosen, rejected) tokens. The first token of every chosen response has id 0, as padding has; the
    longest chosen response begins with the planted ids.
    """
    sizes = np.array(lengths, np.int32).reshape(-1, 3)
    offsets = np.concatenate(([0], np.cumsum(sizes.sum(axis=1, dtype=np.int64))))
    tokens = np.random.default_rng(seed).integers(1, vocab_size, offsets[-1], dtype=np.int32)
    tokens[offsets[:-1] + sizes[:, 0]] = 0
    longest = int(sizes[:, 1].argmax())
    start = offsets[longest] + sizes[longest, 0]
    tokens[start : start + len(planted)] = planted
    count = len(sizes)
    return InMemoryPairs(
        tokens=tokens,
        offsets=offsets,
        prompt_length=sizes[:, 0].copy(),
        chosen_length=sizes[:, 1].copy(),
        rejected_length=sizes[:, 2].copy(),
        weight=np.array([1.0] * count if weight is None else weight, np.float32),
        margin=np.array([np.nan] * count if margin is None else margin, np.float32),
        truncated=np.array([0] * count if truncated is None else truncated, np.uint8),
    )
