"""SFT: the negative log-likelihood of the chosen responses. The paper's Base setup trains it before SimPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simpo_megatron.objectives.base import Objective
from simpo_megatron.objectives.measured import CHOSEN_METRICS, Metric, PairScores


@dataclass(frozen=True)
class SFT(Objective):
    """SFT."""

    name: ClassVar[str] = "sft"
    responses: ClassVar[int] = 1
    metrics: ClassVar[tuple[Metric, ...]] = CHOSEN_METRICS
    own_nll_weight: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("nll_weight")

    def pair_losses(self, scores: PairScores) -> None:
        """None: the NLL term is the whole loss."""
        return

    def pair_slopes(self, scores: PairScores) -> Tensor:
        """0, because there is no loss of a pair: the NLL term is the whole loss."""
        return torch.zeros_like(scores.sums_PM)

    def rewards(self, scores: PairScores) -> Tensor:
        """The average log-probs, [P, 1]."""
        return scores.averages_PM

    def describe(self) -> str:
        """The name, the loss, and its weight and divisor."""
        return f"SFT: negative log-likelihood of the chosen responses{self.describe_nll()}"
