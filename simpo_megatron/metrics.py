"""The metrics of a step: sums over the pairs of each microbatch, reduced once a step.

Which metrics there are, an objective says (`objectives/measured.py`). Every metric is a sum over the global batch,
divided by one of the `DIVISORS` or by nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from simpo_megatron.objectives import Measured, Metric

DIVISORS = ("pairs", "chosen_tokens")  # of the global batch


def metric_sums(metrics: Sequence[Metric], measured: Measured) -> dict[str, Tensor]:
    """The sums of one microbatch: fp64 scalars by the names of the metrics, and both divisors.

    Args:
        metrics: of the objective.
        measured: what they are computed from.
    """
    pairs = len(measured.scores.sums_PM)
    sums = {
        "pairs": measured.loss.new_tensor(pairs, dtype=torch.float64),
        "chosen_tokens": measured.scores.lengths_PM[:, 0].double().sum(),
    }
    return sums | {metric.name: metric.value(measured).double().sum() for metric in metrics}


def reduce_metrics(sums: Sequence[dict[str, Tensor]], metrics: Sequence[Metric]) -> dict[str, float]:
    """Reduces the sums of all ranks to the metrics of the global batch, the same on every rank.

    Collectives: one all-reduce over the data-parallel ranks (context- and tensor-parallel ranks hold equal numbers);
    with pipeline parallelism one broadcast from the last stage.

    Args:
        sums: `metric_sums` of each microbatch of this rank; empty on the stages before the last.
        metrics: of the objective.

    Returns:
        The value of each metric, by name.
    """
    names = [*DIVISORS, *(metric.name for metric in metrics)]
    total = torch.zeros(len(names), dtype=torch.float64, device=torch.cuda.current_device())
    for of_microbatch in sums:
        total += torch.stack([of_microbatch[name] for name in names])
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(total, last, group=pipeline)
    found = dict(zip(names, total.tolist(), strict=True))
    divisors = {"none": 1.0, **{name: max(found[name], 1.0) for name in DIVISORS}}
    return {metric.name: found[metric.name] / divisors[metric.divisor] for metric in metrics}
