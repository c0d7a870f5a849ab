"""A microbatch of preference pairs: whole pairs packed back to back into one row of tokens (THD).

    tokens     prompt chosen | prompt rejected | prompt chosen | prompt rejected | padding
    segments   -- - 0  0  0  -  -- - 1  1  1   ...

Position t scores token t + 1 of its own sequence. So the last prompt token scores the first response token, and the last token
of a sequence scores nothing. Targets and segments are computed on the whole row, before it is cut: a shift of the slices would
score tokens across their borders. Under context parallelism every sequence is padded to a multiple of 2 * CP, and each rank
takes its zig-zag slices (`context_parallel.py`) of tokens, targets and segments together.

Shapes: T tokens of this rank, S scored responses, R scored positions of this rank, P pairs, M scored responses of a pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from simpo_megatron.batch.shared_prompts import SharedPromptParams
from simpo_megatron.data import CHOSEN_CUT, REJECTED_CUT, Pairs
from simpo_megatron.head.task import ScoredPositions
from simpo_megatron.objectives import PairScores
from simpo_megatron.parallel.context import positions, round_up, sequence_multiple


@dataclass(frozen=True)
class BatchCounts:
    """What the global batch holds, over all ranks and microbatches: the divisors of the loss.

    Attributes:
        pairs: pairs.
        chosen_tokens: scored tokens of the chosen responses.
        packed_rows: those that hold pairs.
    """

    pairs: int
    chosen_tokens: int
    packed_rows: int


@dataclass(frozen=True)
class PreferenceBatch:
    """One packed row, or this rank's slices of it.

    Sequences come as chosen, rejected, chosen, rejected, ...; or chosen alone (`responses` is 1). Fields indexed by S or P are
    the same on all context-parallel ranks; fields indexed by T or R are this rank's.

    Attributes:
        tokens: [1, T] int64.
        position_ids: [1, T] int64, from 0 in every sequence; a shared prompt stands before both responses.
        padding_mask: [1, T] bool, True where a token is padding. An empty row marks its first token as text, because Megatron's
            balancing loss divides by the number of unpadded tokens.
        packed_seq_params: `cu_seqlens` of the whole row, all CP * T tokens; the padding at its end is a sequence too.
        scored: the positions that score a response token.
        lengths: [S] int64, scored tokens of each response.
        truncated: [S] bool, the response lost its end.
        weight: [P] fp32, factor of the pair's loss.
        margin: [P] fp32, the pair's own target reward margin; NaN where the objective's applies.
        pairs: [P] indices of the pairs in the data set.
        responses: scored responses of a pair, M.
        counts: of the global batch.
    """

    tokens: Tensor
    position_ids: Tensor
    padding_mask: Tensor
    packed_seq_params: PackedSeqParams
    scored: ScoredPositions
    lengths: Tensor
    truncated: Tensor
    weight: Tensor
    margin: Tensor
    pairs: tuple[int, ...]
    responses: int
    counts: BatchCounts

    def segment_sums(self, values_R: Tensor) -> Tensor:
        """Sums the values of this rank's scored positions by response: [R] -> [P, M]."""
        sums_S = values_R.new_zeros(self.lengths.shape[0]).index_add(0, self.scored.segments_R, values_R)
        return sums_S.view(-1, self.responses)

    def scores(self, sums_PM: Tensor) -> PairScores:
        """What an objective sees of these pairs, given the summed log-probs of their responses."""
        return PairScores(sums_PM, self.lengths.view(-1, self.responses), self.margin, self.weight)


@dataclass(frozen=True)
class RowFormat:
    """How rows are laid out and cut.

    Attributes:
        responses: responses of a pair that are laid out: 2 for chosen and rejected, 1 for chosen alone.
        share_prompts: the prompt of a pair stands once (`shared_prompts.py`); not under context parallelism.
        row_length: pad the whole row to this many tokens; None pads only to `row_multiple`.
        row_multiple: the tokens of a rank are a multiple of this (tensor_model_parallel_size under sequence parallelism).
        context_parallel_size, context_parallel_rank: which slices of the row.
    """

    responses: int = 2
    share_prompts: bool = False
    row_length: int | None = None
    row_multiple: int = 1
    context_parallel_size: int = 1
    context_parallel_rank: int = 0


def pack_row(
    pairs: Pairs,
    indices: Sequence[int],
    counts: BatchCounts,
    row_format: RowFormat = RowFormat(),
    device: torch.device | str = "cpu",
) -> PreferenceBatch:
    """Builds the row of some pairs, or the slices of it that a context-parallel rank holds.

    Args:
        pairs: tokenized pairs.
        indices: of the pairs in the row. None gives an empty row: padding alone, which keeps collectives matched.
        counts: what the global batch of this row holds.
        row_format: how the row is laid out and cut.
        device: where the tensors go.

    Raises:
        ValueError: the pairs do not fit into `row_length`.
    """
    row = _lay_out(pairs, indices, row_format)
    scored, held = _cut(row, len(indices), row_format, device)
    index = np.asarray(indices, dtype=np.int64)
    bits = (CHOSEN_CUT, REJECTED_CUT)[: row_format.responses]
    truncated = np.stack([pairs.columns["truncated"][index] & bit != 0 for bit in bits], axis=1).reshape(-1)
    return PreferenceBatch(
        tokens=_tensor(row.tokens[held], device)[None],
        position_ids=_tensor(row.position_ids[held], device)[None],
        padding_mask=_tensor(row.padding[held], device, torch.bool)[None],
        packed_seq_params=_packed_seq_params(row, row_format, device),
        scored=scored,
        lengths=_tensor(row.lengths, device),
        truncated=_tensor(truncated, device, torch.bool),
        weight=_tensor(pairs.columns["weight"][index], device, torch.float32),
        margin=_tensor(pairs.columns["margin"][index], device, torch.float32),
        pairs=tuple(index.tolist()),
        responses=row_format.responses,
        counts=counts,
    )


def _packed_seq_params(row: _WholeRow, row_format: RowFormat, device: torch.device | str) -> PackedSeqParams:
    """Megatron's description of the whole row."""
    cu_seqlens, longest = _tensor(row.offsets, device, torch.int32), int(np.diff(row.offsets).max())
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    if not row_format.share_prompts:
        return packed
    return SharedPromptParams(**vars(packed), splits=row.splits, position_ids=_tensor(row.position_ids, device))


@dataclass(frozen=True)
class _WholeRow:
    """A row before it is cut; arrays on the host.

    Attributes:
        tokens, position_ids, padding: [T] of the whole row.
        offsets: int32, where the sequences start, and the end of the last; padding at the end of the row is one more.
        positions, targets, segments: [R] of the whole row, see `ScoredPositions`.
        lengths: [S] scored tokens of each response.
        splits: tokens of the prompt and of the chosen response, for every pair whose prompt stands once.
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


def _lay_out(pairs: Pairs, indices: Sequence[int], row_format: RowFormat) -> _WholeRow:
    """Puts the sequences into one row, and finds what every position scores."""
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
    return _WholeRow(
        tokens=tokens,
        position_ids=position_ids,
        padding=padding,
        offsets=offsets,
        positions=np.concatenate(scoring),
        targets=np.concatenate(targets),
        segments=np.repeat(np.arange(len(lengths)), lengths),
        lengths=lengths,
        splits=tuple((len(prompt), len(responses[0])) for prompt, responses in sequences),
    )


_Sequence = tuple[np.ndarray, list[np.ndarray]]
"""A prompt, and the responses that stand behind it."""


def _sequences(pairs: Pairs, indices: Sequence[int], row_format: RowFormat) -> list[_Sequence]:
    """The sequences of the pairs: one a response, or one a pair where it shares its prompt."""
    found: list[_Sequence] = []
    for prompt, *responses in map(pairs.pair, indices):
        scored = responses[: row_format.responses]
        found += [(prompt, scored)] if row_format.share_prompts else [(prompt, [response]) for response in scored]
    return found


def _offsets(sequences: list[_Sequence], indices: Sequence[int], row_format: RowFormat) -> np.ndarray:
    """Where the sequences start in the row, padded as context parallelism needs it, and where the row ends."""
    multiple = sequence_multiple(row_format.context_parallel_size)
    sizes = [round_up(len(prompt) + sum(map(len, responses)), multiple) for prompt, responses in sequences]
    used = sum(sizes)
    shortest = math.lcm(row_format.row_multiple * row_format.context_parallel_size, multiple)
    total = row_format.row_length or round_up(max(used, 1), shortest)
    if used > total:
        raise ValueError(f"pairs {list(indices)} need {used} tokens, the row has {total}")
    if total > used:
        sizes.append(total - used)
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)


def _cut(
    row: _WholeRow, num_pairs: int, row_format: RowFormat, device: torch.device | str
) -> tuple[ScoredPositions, np.ndarray]:
    """What one context-parallel rank scores, and the places in the row of the tokens it holds."""
    size, rank = row_format.context_parallel_size, row_format.context_parallel_rank
    held = [positions(row.offsets.tolist(), size, other) for other in range(size)]
    local, holder = np.full(len(row.tokens), -1), np.empty(len(row.tokens), np.int64)
    local[held[rank]] = np.arange(len(held[rank]))
    for other, places in enumerate(held):
        holder[places] = other
    here = local[row.positions] >= 0
    per_pair = np.zeros((size, num_pairs), np.int64)
    np.add.at(per_pair, (holder[row.positions], row.segments // row_format.responses), 1)
    scored = ScoredPositions(
        positions_R=_tensor(local[row.positions][here], device),
        targets_R=_tensor(row.targets[here], device),
        segments_R=_tensor(row.segments[here], device),
        per_pair=tuple(per_pair[rank].tolist()),
        per_pair_max=tuple(per_pair.max(axis=0).tolist()),
    )
    return scored, held[rank]


def _tensor(array: np.ndarray, device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)
