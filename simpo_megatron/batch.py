"""A microbatch of preference pairs: whole pairs packed back to back into one row of tokens (THD).

    row        prompt chosen | prompt rejected | prompt chosen | prompt rejected | padding
    segment    -- - 0  0  0  -  -- - 1  1  1   ...

Targets and segments are computed on the whole row, shifted by one, before anything else happens to it: position t scores
token t + 1 of its own sequence, so the last prompt token scores the first response token and the last token of a sequence
scores nothing. Under context parallelism every sequence is padded to a multiple of 2 * CP and each rank then takes its
zig-zag slices of all of them together (`context_parallel.py`). Shapes: T tokens of this rank, S sequences, R scored positions
of this rank, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from simpo_megatron.context_parallel import positions, round_up, sequence_multiple
from simpo_megatron.data import Pairs
from simpo_megatron.shared_prompts import SharedPromptParams


@dataclass(frozen=True)
class BatchCounts:
    """What the global batch holds, over all ranks and microbatches: the divisors of the loss."""

    pairs: int
    chosen_tokens: int
    rows: int  # that hold pairs, over all ranks


@dataclass(frozen=True)
class PreferenceBatch:
    """One packed row, or this rank's slices of it. Sequences come as chosen, rejected, chosen, rejected, ...; or chosen
    alone (`members` is 1). What is said of sequences and pairs covers all context-parallel ranks."""

    tokens: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in every sequence, a shared prompt before both responses
    padding_mask: Tensor  # [1, T] bool, True where a token is padding; the first of an empty pack stands for text
    packed_seq_params: (
        PackedSeqParams  # cu_seqlens of the whole row: all CP * T tokens, the padding at its end a sequence too
    )
    rows: Tensor  # [R] int64, the positions in `tokens` that score a response token
    targets: Tensor  # [R] int64, the token each of them scores
    segments: Tensor  # [R] int64, the sequence (0 .. S-1) it belongs to
    lengths: Tensor  # [S] int64, scored tokens of each sequence
    pair_rows: tuple[int, ...]  # [P] of `rows`, how many each pair has here; on the host
    largest_rows: tuple[int, ...]  # [P] the same on the context-parallel rank that has most of the pair
    weight: Tensor  # [P] fp32
    margin: Tensor  # [P] fp32, NaN where gamma applies
    truncated: Tensor  # [S] bool, the response lost its end
    members: int  # sequences a pair: 2, or 1 for chosen alone
    counts: BatchCounts  # of the global batch

    def segment_sums(self, values_R: Tensor) -> Tensor:
        """Sums the values of this rank's scored positions by sequence: [R] -> [P, members]."""
        sums_S = values_R.new_zeros(self.lengths.shape[0]).index_add(0, self.segments, values_R)
        return sums_S.view(-1, self.members)


def pack_pairs(
    store: Pairs,
    pairs: Sequence[int],
    counts: BatchCounts,
    *,
    members: int = 2,
    share_prompts: bool = False,
    row_length: int | None = None,
    row_multiple: int = 1,
    context_parallel_size: int = 1,
    context_parallel_rank: int = 0,
    device: torch.device | str = "cpu",
) -> PreferenceBatch:
    """Builds the row of the given pairs, or the slices of it that a context-parallel rank holds.

    Args:
        store: tokenized pairs.
        pairs: indices into the store, whole pairs; none gives an empty pack: padding alone, which keeps collectives matched.
        counts: what the global batch of this row holds.
        members: 2 for chosen and rejected, 1 for chosen alone.
        share_prompts: let the prompt of a pair stand once (`shared_prompts.py`); not under context parallelism.
        row_length: pad the whole row to this many tokens; None pads only to `row_multiple`.
        row_multiple: the tokens of a rank are a multiple of this (tensor_model_parallel_size under sequence parallelism).
        context_parallel_size, context_parallel_rank: which slices of the row.
        device: where the tensors go.

    Raises:
        ValueError: the pairs do not fit into `row_length`.
    """
    groups = 1 if share_prompts else members  # sequences a pair is laid out as
    sequences = [
        (prompt, responses[group:members:groups])
        for prompt, *responses in map(store.pair, pairs)
        for group in range(groups)
    ]
    chunk = sequence_multiple(context_parallel_size)
    sizes = [round_up(len(prompt) + sum(map(len, responses)), chunk) for prompt, responses in sequences]
    used = sum(sizes)
    total = row_length or round_up(max(used, 1), math.lcm(row_multiple * context_parallel_size, chunk))
    if used > total:
        raise ValueError(f"pairs {list(pairs)} need {used} tokens, the row has {total}")
    if total > used:
        sizes.append(total - used)

    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    tokens, padding = np.zeros(total, dtype=np.int64), np.ones(total, dtype=bool)
    position_ids = np.concatenate([np.arange(size) for size in sizes])
    rows, targets = [], []
    for start, (prompt, responses) in zip(offsets.tolist(), sequences, strict=False):
        at = start + len(prompt)
        tokens[start:at] = prompt
        for response in responses:
            end = at + len(response)
            tokens[at:end] = response
            position_ids[at:end] = np.arange(len(prompt), len(prompt) + len(response))
            rows += [[start + len(prompt) - 1], np.arange(at, end - 1)]
            targets.append(response)
            at = end
        padding[start:at] = False
    if not sequences:
        padding[0] = False  # Megatron's balancing loss divides by the tokens that are no padding
    lengths = np.array([len(response) for response in targets], dtype=np.int64)
    segments = np.repeat(np.arange(len(lengths)), lengths)
    scored = np.concatenate([np.zeros(0, np.int64), *rows])
    index = np.asarray(pairs, dtype=np.int64)
    truncated = np.stack([store.truncated[index] & bit != 0 for bit in (1, 2)[:members]], axis=1).reshape(-1)

    # All of the row is known and shifted: only now may it be cut.
    ranks = [positions(offsets.tolist(), context_parallel_size, rank) for rank in range(context_parallel_size)]
    mine = ranks[context_parallel_rank]
    place = np.full(total, -1)
    place[mine] = np.arange(len(mine))
    here = place[scored] >= 0
    holder = np.empty(total, dtype=np.int64)
    for rank, held in enumerate(ranks):
        holder[held] = rank
    pair_rows = np.zeros((context_parallel_size, len(index)), dtype=np.int64)
    np.add.at(pair_rows, (holder[scored], segments // members), 1)

    def tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

    cu_seqlens, longest = tensor(offsets, torch.int32), max(sizes)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    if share_prompts:
        splits = tuple((len(prompt), len(responses[0])) for prompt, responses in sequences)
        packed = SharedPromptParams(**vars(packed), splits=splits, position_ids=tensor(position_ids))
    return PreferenceBatch(
        tokens=tensor(tokens[mine])[None],
        position_ids=tensor(position_ids[mine])[None],
        padding_mask=tensor(padding[mine], torch.bool)[None],
        packed_seq_params=packed,
        rows=tensor(place[scored][here]),
        targets=tensor(np.concatenate([np.zeros(0, np.int64), *targets])[here]),
        segments=tensor(segments[here]),
        lengths=tensor(lengths),
        pair_rows=tuple(pair_rows[context_parallel_rank].tolist()),
        largest_rows=tuple(pair_rows.max(axis=0).tolist()),
        weight=tensor(store.weight[index], torch.float32),
        margin=tensor(store.margin[index], torch.float32),
        truncated=tensor(truncated, torch.bool),
        members=members,
        counts=counts,
    )
