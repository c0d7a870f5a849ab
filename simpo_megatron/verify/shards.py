"""The gradients that a rank holds, completed after the distributed optimizer, and how far they are from a reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.part_layout import rank_slice
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
            weight, rank, ranks = place.entry, place.group.rank(), place.group.size()
            mine = weight.part_layout.split(parameter.main_grad, weight.rows, ranks)[part].double()
            exact = gradient.double()
            if weight.tp_dim is not None:
                whole = mine.shape[weight.tp_dim] * ranks
                rows = rank_slice(exact.shape[weight.tp_dim], whole, rank, ranks)
                exact = exact.narrow(weight.tp_dim, rows.start, rows.stop - rows.start)
            exact = torch.nn.functional.pad(exact, (0, 0) * (exact.ndim - 1) + (0, mine.shape[0] - exact.shape[0]))
            squares = torch.stack(
                [(mine - exact).square().sum(), exact.square().sum(), exact.new_tensor(exact.numel())]
            )
            self.of_rank[name] = self.of_rank.get(name, 0) + squares.cpu()
