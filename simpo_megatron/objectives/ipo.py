"""IPO (arXiv 2310.12036): the log-ratios of a pair shall differ by a fixed amount. It compares with a reference model.

With u = log pi(y | x) / pi_ref(y | x), summed over the tokens of a response, and |y| its length:

    --ipo-form average    loss = (u_w / |w| - u_l / |l| - 1 / (2 beta))^2
    --ipo-form sum        loss = (u_w - u_l - 1 / (2 beta))^2

The averages are TRL's form, which the authors of IPO confirmed to TRL. The tables of the SimPO paper print sums.
beta is TRL's name for the paper's tau.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from simpo_megatron.objectives.base import Objective
from simpo_megatron.objectives.measured import SUM_METRICS, Metric, PairScores
from simpo_megatron.settings import setting


@dataclass(frozen=True)
class IPO(Objective):
    """IPO."""

    name: ClassVar[str] = "ipo"
    metrics: ClassVar[tuple[Metric, ...]] = SUM_METRICS
    needs_reference: ClassVar[bool] = True
    ipo_beta: float = setting(0.1, "1 / (2 * beta) is the target of the difference; TRL's default")
    ipo_form: Literal["average", "sum"] = setting("average", "log-ratios: averages over tokens (TRL's form), or sums")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("ipo_beta")

    def _scale(self, scores: PairScores) -> Tensor:
        """The factor of each summed log-ratio in the difference, [P, M]."""
        return scores.token_shares_PM if self.ipo_form == "average" else torch.ones_like(scores.sums_PM)

    def _misses(self, scores: PairScores) -> Tensor:
        """How far the difference is above its target, [P]."""
        chosen_P, rejected_P = (self._scale(scores) * scores.log_ratios_PM).unbind(1)
        return chosen_P - rejected_P - 1 / (2 * self.ipo_beta)

    def pair_losses(self, scores: PairScores) -> Tensor:
        """The squared distance from the target, [P]."""
        return self._misses(scores).square()

    def pair_slopes(self, scores: PairScores) -> Tensor:
        """See `Objective`."""
        slopes_P = 2 * self._misses(scores)
        return torch.stack((slopes_P, -slopes_P), dim=1) * self._scale(scores)

    def rewards(self, scores: PairScores) -> Tensor:
        """The summed log-ratios times beta, as TRL reports them, [P, M]."""
        return self.ipo_beta * scores.log_ratios_PM

    def describe(self) -> str:
        """The values of the flags."""
        return f"IPO: beta {self.ipo_beta:g}, {self.ipo_form}s{self.describe_nll()}"
