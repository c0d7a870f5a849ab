"""The summed log-probs of the responses of a data set, under the model of an engine.

    sums_PM = score_pairs(engine, pairs)         # every rank calls it, and every rank gets the sums of all pairs

Shapes: P pairs, M scored responses of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from simpo_megatron.batch.row import PreferenceBatch
from simpo_megatron.data import Pairs
from simpo_megatron.trainer.engine import Engine


@dataclass
class SeenSums:
    """An `on_sums` callback of the engine that keeps what this rank sees. Only the last pipeline stage sees sums.

    Attributes:
        seen: the microbatches of this rank, each with its sums [P, M].
    """

    seen: list[tuple[PreferenceBatch, Tensor]] = field(default_factory=list)

    def __call__(self, batch: PreferenceBatch, sums_PM: Tensor) -> None:
        """Keeps a microbatch and its sums."""
        self.seen.append((batch, sums_PM))

    def by_pair(self) -> Iterator[tuple[int, list[float], list[int]]]:
        """Yields the index, the sums and the lengths of every pair that this rank has seen."""
        for batch, sums_PM in self.seen:
            lengths_PM = batch.lengths.view(-1, batch.responses)
            yield from zip(batch.pairs, sums_PM.tolist(), lengths_PM.tolist(), strict=True)


def score_pairs(engine: Engine, pairs: Pairs) -> np.ndarray:
    """Scores a whole data set, --global-batch-size pairs at a time, in its order.

    Collectives: those of an evaluation for every batch, and one all-reduce of the sums.

    Args:
        engine: with the model.
        pairs: the data set.

    Returns:
        [P, M] fp32: the summed log-probs of the scored responses, chosen first. The same on all ranks.
    """
    size, total = engine.config.train.global_batch_size, len(pairs)
    indices = pairs.order(0, total, seed=0, shuffle=False)
    found = SeenSums()
    for start in range(0, total, size):
        engine.evaluate(engine.packer.pack(pairs, indices[start : start + size]), found)
    sums_PM = torch.zeros(total, engine.packer.responses, device=torch.cuda.current_device())
    # All tensor- and context-parallel ranks see the same pairs. Only one of them adds its sums, so that each counts
    # once.
    if parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0:
        seen = list(chain.from_iterable(batch.pairs for batch, _ in found.seen))
        if seen:
            sums_PM[torch.tensor(seen, device=sums_PM.device)] = torch.cat([sums for _, sums in found.seen]).float()
    dist.all_reduce(sums_PM)
    return sums_PM.cpu().numpy()
