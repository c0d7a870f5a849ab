"""RRHF (arXiv 2304.05302): a ranking loss on the average log-probs, and an NLL term. No reference model.

    loss = max(0, log pi(l | x) / |l| - log pi(w | x) / |w|) - lambda * log pi(w | x)

lambda is `--nll-weight`. Its default is 1 with `--nll-normalizer pair`, a sum over tokens for each pair, as in the
formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simpo_megatron.objectives.base import Normalizer, RewardObjective
from simpo_megatron.objectives.measured import AVERAGE_METRICS, Metric, PairScores


@dataclass(frozen=True)
class RRHF(RewardObjective):
    """RRHF."""

    name: ClassVar[str] = "rrhf"
    metrics: ClassVar[tuple[Metric, ...]] = AVERAGE_METRICS
    own_nll_weight: ClassVar[float] = 1.0
    own_nll_normalizer: ClassVar[Normalizer] = "pair"

    def reward_scale(self, scores: PairScores) -> Tensor:
        """1 by the length: the rewards are the average log-probs."""
        return scores.token_shares_PM

    def margin_losses(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """How far the rejected response is above the chosen one."""
        return torch.relu(-margins_P)

    def margin_slopes(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """See `RewardObjective`."""
        return -(margins_P < 0).to(margins_P.dtype)

    def describe(self) -> str:
        """The values of the flags."""
        return f"RRHF{self.describe_nll()}"
