"""The gradients that a rank holds, completed after the distributed optimizer, and how far they are from a reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.placement import PlacedParameter, place_parameters
from simpo_megatron.trainer.engine import Engine


def complete_gradients(engine: Engine) -> None:
    """Completes the reduced gradients on every rank: the distributed optimizer leaves a rank only its part of them.

    Collectives: one all-gather for each gradient bucket, over the ranks that share it.
    """
    if not engine.config.parallel.use_distributed_optimizer:
        return
    for chunk in engine.chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


class ShardErrors:
    """How far this rank's shards of the gradients are from the reference.

    Args:
        engine: with complete gradients (`complete_gradients`).
        hf: the checkpoint.

    Attributes:
        of_rank: by tensor, three sums over this rank's shards, float64: squares of the error, squares of the reference,
            and number of elements.
    """

    def __init__(self, engine: Engine, hf: HFCheckpoint) -> None:
        table = hf.architecture.weights
        self.places: dict[str, list[tuple[PlacedParameter, int]]] = {}
        for place in (
            place for model in engine.models for place in place_parameters(model, table, tied=hf.architecture.tied)
        ):
            for part, name in enumerate(place.hf):
                self.places.setdefault(name, []).append((place, part))
        self.of_rank: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Compares this rank's shards of a tensor with its whole reference gradient."""
        for place, part in self.places.get(name, []):
            parameter: Any = place.parameter
            mine, first, filled = parameter.main_grad, place.entry.first_row(part), 0
            held = next(held for held in place.entry.tensors if part in held)
            exact = place.entry.rows_first(gradient, held)
            exact = exact[:, place.columns] if place.entry.tp_dim == 1 else exact
            squares = torch.zeros(3, dtype=torch.float64)
            for run in place.runs():
                filled = run.offset + run.last - run.first
                if run.part == part:
                    squares += _squares(mine[run.offset : filled], exact[first + run.first : first + run.last])
            if filled < len(mine):  # rows that pad the vocabulary have no gradient
                squares += _squares(mine[filled:], torch.zeros_like(mine[filled:]))
            self.of_rank[name] = self.of_rank.get(name, 0) + squares


def _squares(mine: Tensor, exact: Tensor) -> Tensor:
    """Squares of the error, squares of the reference, and number of elements: [3] float64, on the CPU."""
    mine, exact = mine.double(), exact.double()
    return torch.stack([(mine - exact).square().sum(), exact.square().sum(), exact.new_tensor(exact.numel())]).cpu()
