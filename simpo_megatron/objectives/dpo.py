"""DPO and its variants with the same loss: LN-DPO and R-DPO. They compare with a reference model.

With u = log pi(y | x) / pi_ref(y | x), summed over the tokens of a response, and |y| its length:

    DPO     (arXiv 2305.18290)    loss = -log sigmoid(beta * (u_w - u_l))
    LN-DPO  (arXiv 2405.14734)    loss = -log sigmoid(beta * (u_w / |w| - u_l / |l|))
    R-DPO   (arXiv 2403.19159)    loss = -log sigmoid(beta * (u_w - u_l) + alpha * (|w| - |l|))

The sign of alpha: R-DPO subtracts alpha * |y| from the reward that the policy maximises. The reward that a policy
stands for is then beta * u + alpha * |y|. So a longer chosen response has a part of its margin already, and is
pushed less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from simpo_megatron.objectives.base import RewardObjective, sigmoid_loss, sigmoid_slope
from simpo_megatron.objectives.measured import SUM_METRICS, Metric, PairScores
from simpo_megatron.settings import require, setting


@dataclass(frozen=True)
class DPO(RewardObjective):
    """DPO."""

    name: ClassVar[str] = "dpo"
    metrics: ClassVar[tuple[Metric, ...]] = SUM_METRICS
    needs_reference: ClassVar[bool] = True
    dpo_beta: float = setting(0.1, "scale of the rewards; TRL's default, the SimPO paper uses 0.01")
    dpo_label_smoothing: float = setting(0.0, "probability that the two responses of a pair were swapped")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("dpo_beta")
        require(
            0 <= self.dpo_label_smoothing < 0.5,
            f"--dpo-label-smoothing {self.dpo_label_smoothing} must be at least 0 and less than 0.5",
        )

    def reward_scale(self, scores: PairScores) -> float:
        """The value of --dpo-beta."""
        return self.dpo_beta

    def margin_losses(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """-log sigmoid of the margin, smoothed."""
        return sigmoid_loss(margins_P, self.dpo_label_smoothing)

    def margin_slopes(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """See `RewardObjective`."""
        return sigmoid_slope(margins_P, self.dpo_label_smoothing)

    def describe(self) -> str:
        """The values of the flags."""
        smoothing = f", label smoothing {self.dpo_label_smoothing:g}" if self.dpo_label_smoothing else ""
        return f"DPO: beta {self.dpo_beta:g}{smoothing}{self.describe_nll()}"


@dataclass(frozen=True)
class LNDPO(RewardObjective):
    """LN-DPO."""

    name: ClassVar[str] = "ln-dpo"
    metrics: ClassVar[tuple[Metric, ...]] = SUM_METRICS
    needs_reference: ClassVar[bool] = True
    ln_dpo_beta: float = setting(0.1, "scale of the rewards, which are averages over tokens; TRL's default")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("ln_dpo_beta")

    def reward_scale(self, scores: PairScores) -> Tensor:
        """The value of --ln-dpo-beta by the length."""
        return self.ln_dpo_beta * scores.token_shares_PM

    def describe(self) -> str:
        """The values of the flags."""
        return f"LN-DPO: beta {self.ln_dpo_beta:g}{self.describe_nll()}"


@dataclass(frozen=True)
class RDPO(RewardObjective):
    """R-DPO."""

    name: ClassVar[str] = "rdpo"
    metrics: ClassVar[tuple[Metric, ...]] = SUM_METRICS
    needs_reference: ClassVar[bool] = True
    rdpo_beta: float = setting(0.1, "scale of the rewards; the SimPO paper searches 0.01, 0.05 and 0.1")
    rdpo_alpha: float = setting(
        0.05, "what a token counts in the margin; the SimPO paper searches 0.05, 0.1, 0.5 and 1; 0: DPO"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("rdpo_beta")
        self.not_negative("rdpo_alpha")

    def reward_scale(self, scores: PairScores) -> float:
        """The value of --rdpo-beta."""
        return self.rdpo_beta

    def _logits(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        longer_P = (scores.lengths_PM[:, 0] - scores.lengths_PM[:, 1]).to(margins_P.dtype)
        return margins_P + self.rdpo_alpha * longer_P

    def margin_losses(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """-log sigmoid of the margin with the part that the length gives to it."""
        return sigmoid_loss(self._logits(margins_P, scores))

    def margin_slopes(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """See `RewardObjective`."""
        return sigmoid_slope(self._logits(margins_P, scores))

    def describe(self) -> str:
        """The values of the flags."""
        return f"R-DPO: beta {self.rdpo_beta:g}, alpha {self.rdpo_alpha:g}{self.describe_nll()}"
