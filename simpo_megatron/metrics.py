"""What a step reports: sums over pairs, reduced once a step, under TRL's names.

`logps/*` are averages over the response's tokens, as TRL's CPOTrainer logs them for SimPO (DPO tools log sums). Rewards are
after beta and without gamma. Accuracy is strict: a tie counts as wrong, and `ties` says how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

# Every metric is a sum divided by `pairs` or by `chosen_tokens`; the order is that of the reduced vector.
DIVISORS = ("pairs", "chosen_tokens")
PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/above_gamma",
    "rewards/ties",
    "logps/chosen",
    "logps/rejected",
    "response_length/chosen",
    "response_length/rejected",
    "truncated/chosen",
    "truncated/rejected",
)
CHOSEN_METRICS = ("logps/chosen", "response_length/chosen", "truncated/chosen")


def metric_names(members: int) -> tuple[str, ...]:
    """The names a batch of `members` sequences a pair reports, in the order of its vector, divisors first."""
    return (*DIVISORS, "loss", "nll_loss", *(PAIR_METRICS if members == 2 else CHOSEN_METRICS))


def pair_sums(logps_PM: Tensor, lengths_PM: Tensor, truncated_PM: Tensor, beta: float, gamma_P: Tensor) -> list[Tensor]:
    """The sums over pairs behind `PAIR_METRICS` (M = 2) or `CHOSEN_METRICS` (M = 1), in that order.

    Args:
        logps_PM: average log-probs, chosen first.
        lengths_PM, truncated_PM: scored tokens, and whether the response lost its end.
        gamma_P: target margin of each pair.
    """
    members = [*logps_PM.unbind(1), *lengths_PM.unbind(1), *truncated_PM.unbind(1)]
    if logps_PM.shape[1] == 2:
        chosen_P, rejected_P = (beta * logps_PM).unbind(1)
        margin_P = chosen_P - rejected_P
        members = [
            chosen_P,
            rejected_P,
            margin_P,
            margin_P > 0,
            margin_P > gamma_P,
            margin_P == 0,
            *members,
        ]
    return [value.double().sum() for value in members]


def reduce_metrics(vectors: Sequence[Tensor], members: int) -> dict[str, float]:
    """Means over the global batch, the same on every rank.

    Collectives: one all-reduce over the data-parallel ranks (context- and tensor-parallel ranks hold equal numbers), one
    broadcast from the last pipeline stage.

    Args:
        vectors: what `step` returned for each microbatch, fp64 vectors in the order of `metric_names`; empty on the stages
            before the last.
        members: sequences a pair of these batches.
    """
    names = metric_names(members)
    device = torch.cuda.current_device()
    total = torch.zeros(len(names), dtype=torch.float64, device=device)
    for vector in vectors:
        total += vector
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(total, last, group=pipeline)
    sums = dict(zip(names, total.tolist(), strict=True))
    pairs, chosen_tokens = (max(sums.pop(name), 1.0) for name in DIVISORS)
    means = {name: value / pairs for name, value in sums.items()}
    means["loss"] = sums["loss"]  # step.py divides the loss: its terms do not share one divisor
    means["nll_loss"] = sums["nll_loss"] / chosen_tokens
    return means
