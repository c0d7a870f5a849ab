"""ORPO (arXiv 2403.07691): the NLL of the chosen response, and the log-odds ratio of the two. No reference model.

With p(y) = exp(log pi(y | x) / |y|), the geometric mean of the token probabilities, and odds(y) = p(y) / (1 - p(y)):

    loss = -log p(w) - lambda * log sigmoid(log odds(w) - log odds(l))

This is the form of the SimPO paper's table. TRL's first term is another: a mean over the tokens of prompt and response
in a microbatch. TRL calls lambda `beta`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simpo_megatron.objectives.base import Objective, sigmoid_loss, sigmoid_slope
from simpo_megatron.objectives.measured import AVERAGE_METRICS, Measured, Metric, PairScores
from simpo_megatron.settings import setting

_LARGEST = -1e-6  # of an average log-prob: at 0, where the model is certain of every token, the odds are infinite


def _averages(scores: PairScores) -> Tensor:
    """The average log-probs, [P, M], kept away from 0."""
    return scores.averages_PM.clamp(max=_LARGEST)


def log_odds_ratios(scores: PairScores) -> Tensor:
    """The log-odds of the chosen response minus those of the rejected one, [P]."""
    averages_PM = _averages(scores)
    log_odds_PM = averages_PM - torch.log(-torch.expm1(averages_PM))
    return log_odds_PM[:, 0] - log_odds_PM[:, 1]


def _log_odds_ratio(found: Measured) -> Tensor:
    return log_odds_ratios(found.scores)


@dataclass(frozen=True)
class ORPO(Objective):
    """ORPO."""

    name: ClassVar[str] = "orpo"
    metrics: ClassVar[tuple[Metric, ...]] = (
        *AVERAGE_METRICS,
        Metric("log_odds_ratio", lambda found: -sigmoid_loss(_log_odds_ratio(found))),  # TRL's names
        Metric("log_odds_chosen", _log_odds_ratio),
    )
    orpo_lambda: float = setting(0.1, "weight of the odds-ratio term; TRL's default (`beta` there)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("orpo_lambda")

    def pair_losses(self, scores: PairScores) -> Tensor:
        """Both terms, [P]."""
        return self.orpo_lambda * sigmoid_loss(log_odds_ratios(scores)) - scores.averages_PM[:, 0]

    def pair_slopes(self, scores: PairScores) -> Tensor:
        """See `Objective`."""
        slopes_P = self.orpo_lambda * sigmoid_slope(log_odds_ratios(scores))
        averages_PM = scores.averages_PM
        # The derivative of log odds by the average is 1 / (1 - p); 0 where the average is clamped.
        odds_slopes_PM = (averages_PM <= _LARGEST) / -torch.expm1(_averages(scores))
        slopes_PM = torch.stack((slopes_P, -slopes_P), dim=1) * odds_slopes_PM
        slopes_PM[:, 0] -= 1
        return slopes_PM / scores.lengths_PM

    def rewards(self, scores: PairScores) -> Tensor:
        """The average log-probs times lambda, as TRL reports them, [P, M]."""
        return self.orpo_lambda * scores.averages_PM

    def describe(self) -> str:
        """The values of the flags."""
        return f"ORPO: lambda {self.orpo_lambda:g}{self.describe_nll()}"
