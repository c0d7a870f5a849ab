"""From the pairs of a global batch to this rank's microbatches, for our trainer and for Megatron-LM's.

    packer = RowPacker(seq_length=4096, responses=2, hidden_size=4096)
    batch = packer.pack(pairs, indices)                  # this rank's packed rows, and what the global batch holds
    for microbatch in packer.microbatches(batch): ...    # `PreferenceBatch`es on this rank's device

A microbatch is one packed row.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

from simpo_megatron.batch.row import BatchCounts, PreferenceBatch, pack_row
from simpo_megatron.batch.whole_row import RowFormat
from simpo_megatron.data import Pairs, pack_batch, pair_costs
from simpo_megatron.parallel.context import round_up


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's microbatches of a global batch.

    Attributes:
        pairs: the data set.
        microbatches: indices of the pairs in the packed row of each microbatch; an empty list is an empty row.
        counts: what the global batch holds.
        tokens: of the global batch, without padding.
        row_length: every packed row of this rank is padded to this many tokens, and the pipeline schedule is told so;
            None where each row ends after its last pair.
    """

    pairs: Pairs
    microbatches: list[list[int]]
    counts: BatchCounts
    tokens: int
    row_length: int | None = None


@dataclass(frozen=True)
class RowPacker:
    """How the pairs of a run become packed rows. Its methods need Megatron's `parallel_state` to be initialised.

    Attributes:
        seq_length: tokens a packed row holds at most.
        responses: scored responses of a pair (`Objective.responses`).
        hidden_size: of the model; the cost of a pair depends on it.
        share_prompts: the prompt of a pair is in its row once.
        fixed_length: pad every row to `seq_length`. Else a row ends after its last pair; with pipeline parallelism the
            rows of a global batch are padded to the longest of this data-parallel rank. All stages know that length
            from the plan of the batch, so they need not tell each other the shapes of what they send.
        sequence_parallel: tensor-parallel ranks hold equal parts of a row.
        row_multiple: the number that divides the tokens which a rank multiplies with a weight (`MemoryConfig`).
        microbatch_multiple: the number of microbatches of a rank is a multiple of this (of the pipeline stages, under
            the interleaved schedule).
    """

    seq_length: int
    responses: int
    hidden_size: int
    share_prompts: bool = False
    fixed_length: bool = False
    sequence_parallel: bool = False
    row_multiple: int = 1
    microbatch_multiple: int = 1

    def pack(self, pairs: Pairs, indices: np.ndarray, num_microbatches: int | None = None) -> GlobalBatch:
        """Packs the pairs of a global batch into rows and picks those of this data-parallel rank.

        Args:
            pairs: the data set.
            indices: of the pairs of the global batch, int64.
            num_microbatches: add empty rows up to this many; None adds none.
        """
        prompt = pairs.prompt_length[indices].astype(np.int64)
        columns = (pairs.chosen_length, pairs.rejected_length)[: self.responses]
        responses = [column[indices].astype(np.int64) for column in columns]
        lengths = [
            response + prompt * (not self.share_prompts or first == 0) for first, response in enumerate(responses)
        ]
        row_format = self._row_format()
        tokens = np.sum([round_up(length, row_format.sequence_multiple) for length in lengths], axis=0)
        rows_of_ranks = pack_batch(
            tokens,
            self.seq_length,
            parallel_state.get_data_parallel_world_size(),
            self.microbatch_multiple,
            pair_costs(prompt, responses, self.hidden_size, self.share_prompts),
        )
        mine = rows_of_ranks[parallel_state.get_data_parallel_rank()]
        rows = [[int(indices[i]) for i in row] for row in mine]
        row_length = None
        if self.fixed_length:
            row_length = row_format.shortest(self.seq_length)
        elif parallel_state.get_pipeline_model_parallel_world_size() > 1:
            row_length = row_format.shortest(max(int(tokens[row].sum()) for row in mine))
        return GlobalBatch(
            pairs=pairs,
            microbatches=rows + [[] for _ in range((num_microbatches or 0) - len(rows))],
            counts=BatchCounts(
                pairs=len(indices),
                chosen_tokens=int(pairs.chosen_length[indices].sum()),
                packed_rows=sum(bool(row) for rows in rows_of_ranks for row in rows),
            ),
            tokens=int(np.sum(lengths)),
            row_length=row_length,
        )

    def _row_format(self, row_length: int | None = None) -> RowFormat:
        return RowFormat(
            responses=self.responses,
            share_prompts=self.share_prompts,
            row_length=row_length,
            row_multiple=self.row_multiple
            * (parallel_state.get_tensor_model_parallel_world_size() if self.sequence_parallel else 1),
            context_parallel_size=parallel_state.get_context_parallel_world_size(),
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
        )

    def microbatches(self, batch: GlobalBatch) -> Iterator[PreferenceBatch]:
        """The microbatches of a batch on this rank's device; under context parallelism this rank's slices of them.

        A thread packs the next microbatch while the caller uses the last one. The thread ends before the last
        microbatch is yielded, or when the iterator is closed. Its errors are raised here.
        """
        row_format, device = self._row_format(batch.row_length), torch.device(torch.cuda.current_device())
        stream = torch.cuda.current_stream()

        def build(indices: list[int]) -> PreferenceBatch:
            with torch.cuda.stream(stream):  # the caller's, also in the thread: what it then runs comes after the copy
                return pack_row(batch.pairs, indices, batch.counts, row_format, device)

        first, *rest = batch.microbatches
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="microbatch") as thread:
            ahead = thread.submit(build, first)
            for indices in rest:
                ready, ahead = ahead.result(), thread.submit(build, indices)
                yield ready
            last = ahead.result()
        yield last
