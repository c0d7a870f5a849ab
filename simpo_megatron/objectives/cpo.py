"""CPO (arXiv 2401.08417): DPO without a reference model, and an NLL term.

    r(x, y) = beta * log pi(y | x)
    loss    = -log sigmoid(r_w - r_l) + lambda * NLL

lambda is `--nll-weight`. The default is that of TRL and of the authors' code: 1, with a mean over the chosen tokens of
the global batch. The formula of the paper has a sum over tokens for each pair: `--nll-normalizer pair`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simpo_megatron.objectives.base import RewardObjective
from simpo_megatron.objectives.measured import SUM_METRICS, Metric, PairScores
from simpo_megatron.settings import setting


@dataclass(frozen=True)
class CPO(RewardObjective):
    """CPO."""

    name: ClassVar[str] = "cpo"
    metrics: ClassVar[tuple[Metric, ...]] = SUM_METRICS
    own_nll_weight: ClassVar[float] = 1.0
    cpo_beta: float = setting(0.1, "scale of the rewards; TRL's default")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("cpo_beta")

    def reward_scale(self, scores: PairScores) -> float:
        """The value of --cpo-beta."""
        return self.cpo_beta

    def describe(self) -> str:
        """The values of beta and the NLL term."""
        return f"CPO: beta {self.cpo_beta:g}{self.describe_nll()}"
