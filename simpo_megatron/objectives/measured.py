"""What an objective sees of pairs, and what a step reports of them.

Shapes: P pairs, M scored responses of a pair (2: chosen and rejected; 1: chosen alone).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from simpo_megatron.settings import required


@dataclass(frozen=True)
class PairScores:
    """What an objective sees of some pairs. It is the same on all tensor- and context-parallel ranks.

    Attributes:
        sums_PM: log-probs of the responses, summed over their tokens, chosen first; fp32 or fp64, differentiable.
        lengths_PM: scored tokens of the responses, int64 or floating.
        margin_P: target reward margin that the data sets for the pair; NaN if the data sets none.
        weight_P: factor of the pair's loss. The step multiplies by it; an objective need not.
        reference_sums_PM: the same sums under a reference model, without gradient; NaN for pairs without
            (`Pairs.with_reference_sums`), None where the caller has none at all.
    """

    sums_PM: Tensor
    lengths_PM: Tensor
    margin_P: Tensor
    weight_P: Tensor
    reference_sums_PM: Tensor | None = None

    @classmethod
    def of_sums(cls, sums_PM: Tensor, lengths_PM: Tensor, reference_sums_PM: Tensor) -> PairScores:
        """The scores of pairs whose rewards alone are wanted: no target margin and no weight is known."""
        unknown_P = torch.full((len(sums_PM),), torch.nan)
        return cls(sums_PM, lengths_PM, unknown_P, unknown_P, reference_sums_PM)

    @property
    def averages_PM(self) -> Tensor:
        """The average log-prob of each response's tokens, in the dtype of the sums."""
        return self.sums_PM / self.lengths_PM

    @property
    def token_shares_PM(self) -> Tensor:
        """One by the length of each response, in the dtype of the sums (an integer length alone would give fp32)."""
        return torch.ones_like(self.sums_PM) / self.lengths_PM

    @property
    def log_ratios_PM(self) -> Tensor:
        """The sums minus those of the reference model: log pi(y | x) / pi_ref(y | x) of each response.

        Raises:
            UserError: there is no reference model.
        """
        known_PM = required(self.reference_sums_PM, "the objective needs log-probs of a reference model")
        return self.sums_PM - known_PM


@dataclass(frozen=True)
class Measured:
    """What the metrics of one microbatch are computed from. Nothing in it has a gradient.

    Attributes:
        scores: of the pairs of the microbatch.
        truncated_PM: bool, True where the response lost its end.
        rewards_PM: what `Objective.rewards` gives for the scores.
        target_margins_P: what `Objective.target_margins` gives for the scores.
        loss: scalar, the share of the microbatch in the loss of the global batch.
    """

    scores: PairScores
    truncated_PM: Tensor
    rewards_PM: Tensor
    target_margins_P: Tensor
    loss: Tensor

    @property
    def margins_P(self) -> Tensor:
        """The reward of the chosen response minus the reward of the rejected one."""
        return self.rewards_PM[:, 0] - self.rewards_PM[:, 1]


@dataclass(frozen=True)
class Metric:
    """One number that a step reports.

    Attributes:
        name: the name in the log; TRL's name if TRL has the metric.
        value: computes one number a pair, [P], or a scalar for the microbatch. It is summed over the global batch.
        divisor: the sum is divided by the number of pairs, by the number of scored chosen tokens, or by nothing.
    """

    name: str
    value: Callable[[Measured], Tensor]
    divisor: Literal["pairs", "chosen_tokens", "none"] = "pairs"


LOSS_METRICS = (
    Metric("loss", lambda found: found.loss, "none"),  # `step.batch_loss` has already divided each term
    Metric("nll_loss", lambda found: -found.scores.sums_PM[:, 0], "chosen_tokens"),
)
# For objectives that score the chosen response alone.
CHOSEN_METRICS = (
    *LOSS_METRICS,
    Metric("logps/chosen", lambda found: found.scores.averages_PM[:, 0]),
    Metric("response_length/chosen", lambda found: found.scores.lengths_PM[:, 0]),
    Metric("truncated/chosen", lambda found: found.truncated_PM[:, 0]),
)
_REWARDS = (
    Metric("rewards/chosen", lambda found: found.rewards_PM[:, 0]),
    Metric("rewards/rejected", lambda found: found.rewards_PM[:, 1]),
    Metric("rewards/margins", lambda found: found.margins_P),
    Metric("rewards/accuracies", lambda found: found.margins_P > 0),  # strict: a tie counts as wrong
    Metric("rewards/ties", lambda found: found.margins_P == 0),
)
_RESPONSES = (
    Metric("likelihood_accuracy", lambda found: found.scores.averages_PM[:, 0] > found.scores.averages_PM[:, 1]),
    Metric("response_length/chosen", lambda found: found.scores.lengths_PM[:, 0]),
    Metric("response_length/rejected", lambda found: found.scores.lengths_PM[:, 1]),
    Metric("truncated/chosen", lambda found: found.truncated_PM[:, 0]),
    Metric("truncated/rejected", lambda found: found.truncated_PM[:, 1]),
)
# For objectives that compare the averages of two responses. TRL then gives the names `logps/*` to averages.
AVERAGE_METRICS = (
    *LOSS_METRICS,
    *_REWARDS,
    Metric("logps/chosen", lambda found: found.scores.averages_PM[:, 0]),
    Metric("logps/rejected", lambda found: found.scores.averages_PM[:, 1]),
    *_RESPONSES,
)
# The same with a target margin.
PAIR_METRICS = (
    *AVERAGE_METRICS,
    Metric("rewards/above_gamma", lambda found: found.margins_P > found.target_margins_P),
)
# For objectives that compare the sums of two responses, or their log-ratios. TRL then gives `logps/*` to sums.
SUM_METRICS = (
    *LOSS_METRICS,
    *_REWARDS,
    Metric("logps/chosen", lambda found: found.scores.sums_PM[:, 0]),
    Metric("logps/rejected", lambda found: found.scores.sums_PM[:, 1]),
    Metric("logps_mean/chosen", lambda found: found.scores.averages_PM[:, 0]),
    Metric("logps_mean/rejected", lambda found: found.scores.averages_PM[:, 1]),
    *_RESPONSES,
)
