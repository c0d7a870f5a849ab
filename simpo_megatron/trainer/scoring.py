"""The summed log-probs of a data set under the model of an engine: for the verifier, and for whoever needs them of a set.

    sums_PM = score_pairs(engine, pairs)         # every rank calls it, every rank gets all of them

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
    """An `on_sums` of the engine: keeps what this rank sees; nothing on the stages before the last."""

    seen: list[tuple[PreferenceBatch, Tensor]] = field(default_factory=list)

    def __call__(self, batch: PreferenceBatch, sums_PM: Tensor) -> None:
        self.seen.append((batch, sums_PM))

    def by_pair(self) -> Iterator[tuple[int, list[float], list[int]]]:
        """Index, sums and lengths of every pair that this rank has seen."""
        for batch, sums_PM in self.seen:
            lengths_PM = batch.lengths.view(-1, batch.responses)
            yield from zip(batch.pairs, sums_PM.tolist(), lengths_PM.tolist(), strict=True)


def score_pairs(engine: Engine, pairs: Pairs) -> np.ndarray:
    """Summed log-probs of the scored responses of all pairs of a set, chosen first: [P, M] fp32, the same on all ranks.

    The set is scored --global-batch-size pairs at a time, in its order.

    Collectives: those of an evaluation for every batch, and one all-reduce of the sums.
    """
    size, total = engine.config.train.global_batch_size, len(pairs)
    indices = pairs.order(0, total, seed=0, shuffle=False)
    found = SeenSums()
    for start in range(0, total, size):
        engine.evaluate(engine.packer.pack(pairs, indices[start : start + size]), found)
    sums_PM = torch.zeros(total, engine.packer.responses, device=torch.cuda.current_device())
    # Tensor- and context-parallel ranks see the same pairs: one of them tells, so that the sum over ranks is exact.
    if parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0:
        seen = list(chain.from_iterable(batch.pairs for batch, _ in found.seen))
        if seen:
            sums_PM[torch.tensor(seen, device=sums_PM.device)] = torch.cat([sums for _, sums in found.seen]).float()
    dist.all_reduce(sums_PM)
    return sums_PM.cpu().numpy()
