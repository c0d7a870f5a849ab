"""A microbatch of preference pairs: one packed row, that is whole pairs back to back (Megatron's format `thd`).

    tokens     prompt chosen | prompt rejected | prompt chosen | prompt rejected | padding
    segments   -- - 0  0  0  -  -- - 1  1  1   ...

Position t scores token t + 1 of its own sequence. So the last prompt token scores the first response token, and the
last token of a sequence scores nothing.

Under context parallelism every sequence is padded to a multiple of 2 * CP, and each rank takes its zig-zag slices
(`parallel/context.py`) of the row. Targets and segments are computed on the whole row, before it is cut. If the slices
were shifted, the last position of a slice would score a token from behind the gap.

Shapes: T tokens of this rank, R scored positions of this rank, P pairs, M scored responses of a pair, S = P * M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from simpo_megatron.data import CHOSEN_CUT, REJECTED_CUT, Pairs
from simpo_megatron.head.segments import segment_sums
from simpo_megatron.head.task import ScoredPositions
from simpo_megatron.models.shared_prompts import SharedPromptParams
from simpo_megatron.objectives import PairScores
from simpo_megatron.parallel.context import positions, round_up, sequence_multiple


@dataclass(frozen=True)
class BatchCounts:
    """What the global batch holds, over all ranks and microbatches: the divisors of the loss.

    Attributes:
        pairs: how many pairs.
        chosen_tokens: how many scored tokens the chosen responses have.
        packed_rows: how many packed rows hold pairs.
    """

    pairs: int
    chosen_tokens: int
    packed_rows: int


@dataclass(frozen=True)
class PreferenceBatch:
    """One packed row, or this rank's slices of it.

    The responses are in the order chosen, rejected, chosen, rejected, ...; if `responses` is 1, chosen only. Fields
    indexed by S or P are the same on all context-parallel ranks; fields indexed by T or R are this rank's.

    Attributes:
        tokens: [1, T] int64.
        position_ids: [1, T] int64, from 0 in every sequence. After a shared prompt both responses go on from its end.
        padding_mask: [1, T] bool, True where a token is padding. An empty row marks its first token as text, because
            Megatron's balancing loss divides by the number of unpadded tokens.
        packed_seq_params: `cu_seqlens` of the whole row, all CP * T tokens; the padding at its end is a sequence too.
        scored: the positions that score a response token.
        lengths: [S] int64, scored tokens of each response.
        truncated: [S] bool, True where the response lost its end.
        weight: [P] fp32, factor of the pair's loss.
        margin: [P] fp32, the pair's own target reward margin; NaN where that of the objective holds.
        reference_sums: [P, M] fp32, summed log-probs under a reference model; None if the data has none.
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
    reference_sums: Tensor | None
    pairs: tuple[int, ...]
    responses: int
    counts: BatchCounts

    def segment_sums(self, values_R: Tensor) -> Tensor:
        """Sums the values of this rank's scored positions by response: [R] -> [P, M]."""
        return segment_sums(values_R, self.scored.segments_R, self.lengths.shape[0]).view(-1, self.responses)

    def scores(self, sums_PM: Tensor) -> PairScores:
        """What an objective sees of these pairs; `sums_PM` are the summed log-probs of their responses."""
        lengths_PM = self.lengths.view(-1, self.responses)
        return PairScores(sums_PM, lengths_PM, self.margin, self.weight, self.reference_sums)


@dataclass(frozen=True)
class RowFormat:
    """How rows are laid out and cut.

    Attributes:
        responses: responses of a pair that are laid out: 2 for chosen and rejected, 1 for chosen only.
        share_prompts: the prompt of a pair is in the row once; not under context parallelism.
        row_length: pad the whole row to this many tokens; None pads only to `row_multiple`.
        row_multiple: the number of a rank's tokens is a multiple of this (tensor_model_parallel_size under sequence
            parallelism).
        context_parallel_size: ranks that the row is cut for.
        context_parallel_rank: the rank whose slices are taken.
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
    """Packs some pairs into a row, or builds the slices of it that a context-parallel rank holds.

    Args:
        pairs: the data set.
        indices: of the pairs in the row. With none, the row is empty: padding only. A rank without pairs runs such rows
            so that its collectives match those of the other ranks.
        counts: what the global batch holds.
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
        reference_sums=_reference_sums(pairs, index, row_format.responses, device),
        pairs=tuple(index.tolist()),
        responses=row_format.responses,
        counts=counts,
    )


def _reference_sums(pairs: Pairs, index: np.ndarray, responses: int, device: torch.device | str) -> Tensor | None:
    """The reference sums of some pairs, [P, M] fp32, if the data has them."""
    sums_PM = pairs.reference_sums
    return None if sums_PM is None else _tensor(sums_PM[index, :responses], device, torch.float32)


def _packed_seq_params(row: _WholeRow, row_format: RowFormat, device: torch.device | str) -> PackedSeqParams:
    """Megatron's description of the whole row: where its sequences start."""
    cu_seqlens, longest = _tensor(row.offsets, device, torch.int32), int(np.diff(row.offsets).max())
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    if not row_format.share_prompts:
        return packed
    return SharedPromptParams(**vars(packed), splits=row.splits, position_ids=_tensor(row.position_ids, device))


@dataclass(frozen=True)
class _WholeRow:
    """A packed row before it is cut. Its arrays are on the host and cover the whole row.

    Attributes:
        tokens: int64, one for each token of the row, as are the next two.
        position_ids: int64.
        padding: bool.
        offsets: int32, where each sequence starts, and the end of the last. Padding at the end of the row is a
            sequence.
        positions: int64, one for each scored position of the row, as are the next two; see `ScoredPositions`.
        targets: int64.
        segments: int64.
        lengths: [S] scored tokens of each response.
        splits: tokens of the prompt and of the chosen response in each sequence, for shared prompts.
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
    """Lays the sequences out in one row, and computes what every position scores."""
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
    """Cuts the row for one context-parallel rank.

    Returns:
        What the rank scores, and the index in the row of each token that it holds.
    """
    size, rank = row_format.context_parallel_size, row_format.context_parallel_rank
    held = [positions(row.offsets.tolist(), size, other) for other in range(size)]
    # Of every token in the row: its index among this rank's tokens (-1 on other ranks), and the rank that holds it.
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
    """A copy of an array on the device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)
