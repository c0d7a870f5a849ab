"""A packed row on the host, before it is cut for the context-parallel ranks: tokens, and what every position scores.

    row = lay_out(pairs, [3, 1], RowFormat(row_multiple=8))

Sequences stand back to back, each padded as context parallelism needs it. What is left of the row is padding, in
sequences of at most 128 tokens: attention costs the square of a sequence, and nobody reads this part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simpo_megatron.data import Pairs
from simpo_megatron.parallel.context import round_up, sequence_multiple

_PADDING = 128  # tokens of a sequence of padding at most
_MAX_SEQLEN = 256  # `WholeRow.max_seqlen` is a multiple of it


@dataclass(frozen=True)
class RowFormat:
    """How rows are laid out and cut.

    Attributes:
        responses: responses of a pair that are laid out: 2 for chosen and rejected, 1 for chosen only.
        share_prompts: the prompt of a pair is in the row once; not under context parallelism.
        row_length: pad the whole row to this many tokens; None pads only to `row_multiple`.
        row_multiple: the number of a rank's tokens is a multiple of this (tensor_model_parallel_size under sequence
            parallelism, 16 or 32 times that for FP8).
        context_parallel_size: ranks that the row is cut for.
        context_parallel_rank: the rank whose slices are taken.
    """

    responses: int = 2
    share_prompts: bool = False
    row_length: int | None = None
    row_multiple: int = 1
    context_parallel_size: int = 1
    context_parallel_rank: int = 0

    @property
    def sequence_multiple(self) -> int:
        """The number that divides the length of every sequence."""
        return sequence_multiple(self.context_parallel_size)

    def shortest(self, used: int) -> int:
        """Tokens of the shortest row that holds `used` tokens of whole sequences and that the ranks can cut."""
        multiple = math.lcm(self.row_multiple * self.context_parallel_size, self.sequence_multiple)
        return round_up(max(used, 1), multiple)


@dataclass(frozen=True)
class WholeRow:
    """A packed row before it is cut. Its arrays are on the host and cover the whole row.

    Attributes:
        tokens: int64, one for each token of the row, as are the next two.
        position_ids: int64.
        padding: bool.
        offsets: int32, where each sequence starts, and the end of the last. Padding at the end of the row is in
            sequences too.
        positions: int64, one for each scored position of the row, as are the next two; see `ScoredPositions`.
        targets: int64.
        segments: int64.
        lengths: [S] scored tokens of each response.
        splits: tokens of the prompt and of the chosen response in each sequence, for shared prompts.
        max_seqlen: no sequence is longer.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    padding: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    lengths: np.ndarray
    splits: tuple[tuple[int, int], ...]
    max_seqlen: int


def lay_out(pairs: Pairs, indices: Sequence[int], row_format: RowFormat) -> WholeRow:
    """Lays the sequences of some pairs out in one row, and computes what every position scores.

    Args:
        pairs: the data set.
        indices: of the pairs; none for a row of padding only.
        row_format: how the row is laid out.

    Raises:
        ValueError: the pairs do not fit into `row_length`.
    """
    sequences = _sequences(pairs, indices, row_format)
    offsets = _offsets(sequences, indices, row_format)
    tokens, padding = np.zeros(offsets[-1], np.int64), np.ones(offsets[-1], bool)
    position_ids = np.concatenate([np.arange(size) for size in np.diff(offsets)])
    scoring, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, (prompt, responses) in zip(offsets.tolist(), sequences, strict=False):
        at = start + len(prompt)
        tokens[start:at] = prompt
        for response in responses:
            end = at + len(response)
            tokens[at:end] = response
            position_ids[at:end] = np.arange(len(prompt), len(prompt) + len(response))
            scoring += [np.array([start + len(prompt) - 1]), np.arange(at, end - 1)]
            targets.append(response)
            at = end
        padding[start:at] = False
    if not sequences:
        padding[0] = False  # see `PreferenceBatch.padding_mask`
    lengths = np.array([len(response) for response in targets[1:]], np.int64)
    return WholeRow(
        tokens=tokens,
        position_ids=position_ids,
        padding=padding,
        offsets=offsets,
        positions=np.concatenate(scoring),
        targets=np.concatenate(targets),
        segments=np.repeat(np.arange(len(lengths)), lengths),
        lengths=lengths,
        splits=tuple((len(prompt), len(responses[0])) for prompt, responses in sequences),
        max_seqlen=_max_seqlen(offsets, row_format.sequence_multiple),
    )


_Sequence = tuple[np.ndarray, list[np.ndarray]]  # a prompt, and the responses that follow it


def _sequences(pairs: Pairs, indices: Sequence[int], row_format: RowFormat) -> list[_Sequence]:
    """The sequences of the pairs: one for each response, or one for each pair if its responses share the prompt."""
    found: list[_Sequence] = []
    for prompt, *responses in map(pairs.pair, indices):
        scored = responses[: row_format.responses]
        found += [(prompt, scored)] if row_format.share_prompts else [(prompt, [response]) for response in scored]
    return found


def _offsets(sequences: list[_Sequence], indices: Sequence[int], row_format: RowFormat) -> np.ndarray:
    """Where the sequences start in the row, and where it ends. Sequences are padded as context parallelism needs it."""
    multiple = row_format.sequence_multiple
    sizes = [round_up(len(prompt) + sum(map(len, responses)), multiple) for prompt, responses in sequences]
    used = sum(sizes)
    total = row_format.row_length or row_format.shortest(used)
    if used > total:
        raise ValueError(f"pairs {list(indices)} need {used} tokens, the row has {total}")
    piece = max(multiple, _PADDING // multiple * multiple)
    sizes += [min(piece, total - start) for start in range(used, total, piece)]
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)


def _max_seqlen(offsets: np.ndarray, multiple: int) -> int:
    """A bound on the length of the sequences that takes few values.

    Transformer Engine chooses its attention again when the bound changes, and Megatron keeps the rotary angles of the
    last bounds (`rotary_pos_embedding.py`).

    Args:
        offsets: where the sequences start, and the end of the last.
        multiple: divides the length of every sequence, and the bound.
    """
    longest, total = int(np.diff(offsets).max()), int(offsets[-1])
    if longest == total:
        return total
    # Megatron takes as many positions as the row has tokens for the positions of all tokens of the row
    # (`rope_utils.py`, `_apply_rotary_pos_emb_thd`), so the bound stays below.
    return min(round_up(longest, math.lcm(_MAX_SEQLEN, multiple)), total - multiple)
