"""From the pairs of a global batch to this rank's microbatches: the one way, for our trainer and for Megatron-LM's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

from simpo_megatron.batch import BatchCounts, PreferenceBatch, pack_pairs
from simpo_megatron.context_parallel import round_up, sequence_multiple
from simpo_megatron.data import Pairs, pair_costs, plan_batch


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's rows of a global batch, and what the whole batch holds."""

    store: Pairs
    rows: list[list[int]]  # one list of pairs a microbatch; an empty one is an empty pack
    counts: BatchCounts
    tokens: int  # of the whole batch, padding excluded


def plan_global_batch(
    store: Pairs,
    pairs: np.ndarray,
    *,
    members: int,
    share_prompts: bool,
    hidden_size: int,
    seq_length: int,
    microbatch_multiple: int = 1,
    num_microbatches: int | None = None,
) -> GlobalBatch:
    """Packs the pairs of a global batch into rows and picks this data-parallel rank's.

    Args:
        store: tokenized pairs.
        pairs: indices of the whole batch, int64.
        members: sequences a pair: 2, or 1 for chosen alone.
        share_prompts: the prompt of a pair stands once in its row.
        hidden_size: of the model; what a pair costs turns on it.
        seq_length: tokens of a row.
        microbatch_multiple: every rank's number of rows is a multiple of this (pipeline stages, where they interleave).
        num_microbatches: fill up with empty packs to this many; None for as few as the pairs take.
    """
    prompt = store.prompt_length[pairs].astype(np.int64)
    columns = (store.chosen_length, store.rejected_length)[:members]
    responses = [column[pairs].astype(np.int64) for column in columns]
    lengths = [response + prompt * (not share_prompts or i == 0) for i, response in enumerate(responses)]
    multiple = sequence_multiple(parallel_state.get_context_parallel_world_size())
    plan = plan_batch(
        np.sum([round_up(length, multiple) for length in lengths], axis=0),
        seq_length,
        parallel_state.get_data_parallel_world_size(),
        microbatch_multiple,
        pair_costs(prompt, responses, hidden_size, share_prompts),
    )
    mine = plan[parallel_state.get_data_parallel_rank()]
    rows = [[int(pairs[i]) for i in row] for row in mine]
    return GlobalBatch(
        store=store,
        rows=rows + [[] for _ in range((num_microbatches or 0) - len(rows))],
        counts=BatchCounts(
            pairs=len(pairs),
            chosen_tokens=int(store.chosen_length[pairs].sum()),
            rows=sum(bool(row) for ranks_rows in plan for row in ranks_rows),
        ),
        tokens=int(np.sum(lengths)),
    )


def pack_microbatches(
    batch: GlobalBatch, *, members: int, share_prompts: bool, row_length: int | None, sequence_parallel: bool
) -> Iterator[PreferenceBatch]:
    """This rank's rows, or its slices of them, on its device.

    Args:
        batch: from `plan_global_batch`.
        members, share_prompts: as there.
        row_length: tokens every row is padded to; None for rows that end after their last pair.
        sequence_parallel: tensor-parallel ranks hold equal parts of a row.
    """
    for row in batch.rows:
        yield pack_pairs(
            batch.store,
            row,
            batch.counts,
            members=members,
            share_prompts=share_prompts,
            row_length=row_length,
            row_multiple=parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1,
            context_parallel_size=parallel_state.get_context_parallel_world_size(),
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            device=torch.device(torch.cuda.current_device()),
        )
