"""SLiC-HF (arXiv 2305.10425): a hinge on the difference of the summed log-probs, and an NLL term. No reference model.

    loss = max(0, delta - log pi(w | x) + log pi(l | x)) - lambda * log pi(w | x)

lambda is `--nll-weight`. Its default is 1 with `--nll-normalizer pair`, a sum over tokens for each pair, as in the
formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simpo_megatron.objectives.base import Normalizer, RewardObjective
from simpo_megatron.objectives.measured import SUM_METRICS, Metric, PairScores
from simpo_megatron.settings import setting


@dataclass(frozen=True)
class SLiC(RewardObjective):
    """SLiC-HF."""

    name: ClassVar[str] = "slic"
    metrics: ClassVar[tuple[Metric, ...]] = SUM_METRICS
    own_nll_weight: ClassVar[float] = 1.0
    own_nll_normalizer: ClassVar[Normalizer] = "pair"
    slic_delta: float = setting(1.0, "margin of the summed log-probs; the SimPO paper searches 0.5, 1, 2 and 10")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("slic_delta")

    def reward_scale(self, scores: PairScores) -> float:
        """1: the rewards are the summed log-probs."""
        return 1.0

    def margin_losses(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """What the margin lacks to delta."""
        return torch.relu(self.slic_delta - margins_P)

    def margin_slopes(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """See `RewardObjective`."""
        return -(margins_P < self.slic_delta).to(margins_P.dtype)

    def describe(self) -> str:
        """The values of the flags."""
        return f"SLiC-HF: delta {self.slic_delta:g}{self.describe_nll()}"
