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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from simpo_megatron.batch.transfer import send
from simpo_megatron.batch.whole_row import RowFormat, WholeRow, lay_out
from simpo_megatron.data import CHOSEN_CUT, REJECTED_CUT, Pairs
from simpo_megatron.head.segments import segment_sums
from simpo_megatron.head.task import ScoredPositions
from simpo_megatron.models.attention import note_row_layout
from simpo_megatron.models.shared_prompts import SharedPromptParams
from simpo_megatron.objectives import PairScores
from simpo_megatron.parallel.context import positions


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
        packed_seq_params: `cu_seqlens` of the whole row, all CP * T tokens; the padding at its end is in sequences too.
        scored: the positions that score a response token.
        lengths: [S] int64, scored tokens of each response.
        truncated: [S] bool, True where the response lost its end.
        weight: [P] fp32, factor of the pair's loss.
        margin: [P] fp32, the pair's own target reward margin; NaN where that of the objective holds.
        reference_sums: [P, M] fp32, summed log-probs under a reference model; NaN for pairs without.
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
    reference_sums: Tensor
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


_DEFAULT = RowFormat()


def pack_row(
    pairs: Pairs,
    indices: Sequence[int],
    counts: BatchCounts,
    row_format: RowFormat = _DEFAULT,
    device: torch.device | str = "cpu",
) -> PreferenceBatch:
    """Packs some pairs into a row, or builds the slices of it that a context-parallel rank holds.

    Args:
        pairs: the data set.
        indices: of the pairs in the row. With none, the row is empty: padding only. A rank without pairs runs such rows
            so that its collectives match those of the other ranks.
        counts: what the global batch holds.
        row_format: how the row is laid out and cut.
        device: where the tensors go. For a GPU the host does not wait for the copy, which is queued on the stream that
            is current.

    Raises:
        ValueError: the pairs do not fit into `row_length`.
    """
    row = lay_out(pairs, indices, row_format)
    index, responses = np.asarray(indices, dtype=np.int64), row_format.responses
    size, rank = row_format.context_parallel_size, row_format.context_parallel_rank
    held = [positions(row.offsets.tolist(), size, other) for other in range(size)]
    scored, per_pair = _cut(row, len(index), responses, held, rank)
    bits = (CHOSEN_CUT, REJECTED_CUT)[:responses]
    arrays = {
        **scored,
        "tokens": row.tokens[held[rank]][None],
        "position_ids": row.position_ids[held[rank]][None],
        "padding_mask": row.padding[held[rank]][None],
        "cu_seqlens": row.offsets,
        "lengths": row.lengths,
        "truncated": np.stack([pairs.columns["truncated"][index] & bit != 0 for bit in bits], axis=1).reshape(-1),
        "weight": pairs.columns["weight"][index].astype(np.float32),
        "margin": pairs.columns["margin"][index].astype(np.float32),
        "reference_sums": pairs.reference_sums(index)[:, :responses],
    }
    if size > 1:
        arrays["order"] = np.argsort(np.concatenate(held))
    sent = send(arrays, torch.device(device))
    note_row_layout(sent["cu_seqlens"], size, row.offsets.tolist(), sent.pop("order", None))
    return PreferenceBatch(
        packed_seq_params=_packed_seq_params(row, row_format, sent.pop("cu_seqlens"), sent["position_ids"]),
        scored=ScoredPositions(
            positions_R=sent.pop("positions_R"),
            targets_R=sent.pop("targets_R"),
            segments_R=sent.pop("segments_R"),
            per_pair=tuple(per_pair[rank].tolist()),
            per_pair_max=tuple(per_pair.max(axis=0).tolist()),
        ),
        pairs=tuple(index.tolist()),
        responses=responses,
        counts=counts,
        **sent,
    )


def _packed_seq_params(
    row: WholeRow, row_format: RowFormat, cu_seqlens: Tensor, position_ids: Tensor
) -> PackedSeqParams:
    """Megatron's description of the whole row: where its sequences start. With shared prompts [1, T] is all of it."""
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=row.max_seqlen,
        max_seqlen_kv=row.max_seqlen,
    )
    if not row_format.share_prompts:
        return packed
    return SharedPromptParams(**vars(packed), splits=row.splits, position_ids=position_ids[0])


def _cut(
    row: WholeRow, num_pairs: int, responses: int, held: list[np.ndarray], rank: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What one context-parallel rank scores.

    Args:
        row: the whole row.
        num_pairs: of the row, P.
        responses: scored responses of a pair.
        held: for each rank, the index in the row of each token that it holds.
        rank: whose part is wanted.

    Returns:
        The arrays of `ScoredPositions`, and the number of scored positions of every pair on every rank, [ranks, P].
    """
    # Of every token in the row: its index among this rank's tokens (-1 on other ranks), and the rank that holds it.
    local, holder = np.full(len(row.tokens), -1), np.empty(len(row.tokens), np.int64)
    local[held[rank]] = np.arange(len(held[rank]))
    for other, places in enumerate(held):
        holder[places] = other
    here = local[row.positions] >= 0
    per_pair = np.zeros((len(held), num_pairs), np.int64)
    np.add.at(per_pair, (holder[row.positions], row.segments // responses), 1)
    scored = {
        "positions_R": local[row.positions][here],
        "targets_R": row.targets[here],
        "segments_R": row.segments[here],
    }
    return scored, per_pair
