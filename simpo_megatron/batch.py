"""A microbatch of preference pairs: whole pairs packed back to back into one row of tokens (THD).

    row        prompt chosen | prompt rejected | prompt chosen | prompt rejected | padding
    segment    -- - 0  0  0  -  -- - 1  1  1   ...

Targets and segments are computed on the whole row, shifted by one, before anything else happens to it: position t scores
token t + 1 of its own sequence, so the last prompt token scores the first response token and the last token of a sequence
scores nothing. Shapes: T tokens in the row, S sequences, R scored positions, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from simpo_megatron.data import PairStore


@dataclass(frozen=True)
class BatchCounts:
    """What the global batch holds, over all ranks and microbatches: the divisors of the loss."""

    pairs: int
    chosen_tokens: int


@dataclass(frozen=True)
class PreferenceBatch:
    """One packed row. Sequences come as chosen, rejected, chosen, rejected, ...; or chosen alone (`members` is 1)."""

    tokens: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in every sequence
    packed_seq_params: PackedSeqParams  # cu_seqlens cover all T tokens, the padding as a sequence of its own
    rows: Tensor  # [R] int64, the positions that score a response token
    targets: Tensor  # [R] int64, the token each of them scores
    segments: Tensor  # [R] int64, the sequence (0 .. S-1) it belongs to
    lengths: Tensor  # [S] int64, scored tokens of each sequence
    pair_rows: tuple[int, ...]  # [P] of `rows`, how many each pair has; on the host
    weight: Tensor  # [P] fp32
    margin: Tensor  # [P] fp32, NaN where gamma applies
    truncated: Tensor  # [S] bool, the response lost its end
    members: int  # sequences a pair: 2, or 1 for chosen alone
    counts: BatchCounts  # of the global batch

    def segment_sums(self, values_R: Tensor) -> Tensor:
        """Sums the values of the scored positions by sequence: [R] -> [P, members]."""
        sums_S = values_R.new_zeros(self.lengths.shape[0]).index_add(0, self.segments, values_R)
        return sums_S.view(-1, self.members)


def pack_pairs(
    store: PairStore,
    pairs: Sequence[int],
    counts: BatchCounts,
    *,
    members: int = 2,
    row_length: int | None = None,
    row_multiple: int = 1,
    device: torch.device | str = "cpu",
) -> PreferenceBatch:
    """Builds the row of the given pairs.

    Args:
        store: tokenized pairs.
        pairs: indices into the store, whole pairs; none gives an empty pack: padding alone, which keeps collectives matched.
        counts: what the global batch of this row holds.
        members: 2 for chosen and rejected, 1 for chosen alone.
        row_length: pad to this many tokens; None pads only to `row_multiple`.
        row_multiple: the row is a multiple of this (tensor_model_parallel_size under sequence parallelism).
        device: where the tensors go.

    Raises:
        ValueError: the pairs do not fit into `row_length`.
    """
    sequences = [(prompt, response) for i in pairs for prompt, *rs in [store.pair(i)] for response in rs[:members]]
    sizes = [len(prompt) + len(response) for prompt, response in sequences]
    used = sum(sizes)
    total = row_length or max(row_multiple, -(-used // row_multiple) * row_multiple)
    if used > total:
        raise ValueError(f"pairs {list(pairs)} need {used} tokens, the row has {total}")
    if total > used:
        sizes.append(total - used)

    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    tokens = np.zeros(total, dtype=np.int64)
    rows, targets = [], []
    for start, (prompt, response) in zip(offsets.tolist(), sequences, strict=False):
        first = start + len(prompt)
        tokens[start:first] = prompt
        tokens[first : first + len(response)] = response
        rows.append(np.arange(first - 1, first - 1 + len(response)))
        targets.append(response)
    lengths = np.array([len(response) for _, response in sequences], dtype=np.int64)
    index = np.asarray(pairs, dtype=np.int64)
    truncated = np.stack([store.truncated[index] & bit != 0 for bit in (1, 2)[:members]], axis=1).reshape(-1)

    def tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

    cu_seqlens = tensor(offsets, torch.int32)
    longest = max(sizes)
    return PreferenceBatch(
        tokens=tensor(tokens)[None],
        position_ids=tensor(np.concatenate([np.arange(size) for size in sizes]))[None],
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        rows=tensor(np.concatenate(rows) if rows else np.zeros(0)),
        targets=tensor(np.concatenate(targets) if targets else np.zeros(0)),
        segments=tensor(np.repeat(np.arange(len(lengths)), lengths)),
        lengths=tensor(lengths),
        pair_rows=tuple(lengths.reshape(-1, members).sum(axis=1).tolist()),
        weight=tensor(store.weight[index], torch.float32),
        margin=tensor(store.margin[index], torch.float32),
        truncated=tensor(truncated, torch.bool),
        members=members,
        counts=counts,
    )
