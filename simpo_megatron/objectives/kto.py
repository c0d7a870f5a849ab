"""KTO (arXiv 2402.01306) on pairs: each response against a baseline, the chosen one above it, the other below.

With u = log pi(y | x) / pi_ref(y | x), summed over the tokens of a response:

    loss = w_d * (1 - sigmoid(beta * u_w - z0)) + w_u * (1 - sigmoid(z0 - beta * u_l))
    z0   = beta * max(0, mean of u over both responses of the pairs of the previous step)

Both terms are what the value of a response lacks to its weight. So the loss falls where the chosen response rises and
where the rejected one falls. Some copies of the table of the SimPO paper print the second term with the other sign.

The baseline z0 estimates beta * KL(pi || pi_ref) and has no gradient. It is a statistic of a whole batch, so the exact
value of this step would need a second forward pass before the first gradient. Here it is the value of the previous
step, over all data-parallel ranks: a second pass is not needed, and the loss of a pair depends on that pair alone. The
first step has z0 = 0, which is exact where the run starts from the reference model. An evaluation uses the baseline of
the last step. A checkpoint keeps it, so a resumed run goes on with the same losses.

TRL's KTOTrainer takes z0 from the same batch: from responses that are scored once more, behind the prompts of other
pairs. Its loss is a mean over responses, which is half of this mean over pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from simpo_megatron.objectives.base import Objective
from simpo_megatron.objectives.measured import SUM_METRICS, Metric, PairScores
from simpo_megatron.settings import setting

_LOG_RATIO = "kl_on_given_text"


@dataclass(frozen=True)
class KTO(Objective):
    """KTO.

    Attributes:
        baseline: z0; not a flag.
    """

    name: ClassVar[str] = "kto"
    metrics: ClassVar[tuple[Metric, ...]] = (
        *SUM_METRICS,
        Metric(_LOG_RATIO, lambda found: found.scores.log_ratios_PM.mean(1)),
    )
    needs_reference: ClassVar[bool] = True
    needs_baseline: ClassVar[bool] = True
    kto_beta: float = setting(0.1, "scale of the rewards; TRL's default, the SimPO paper searches 0.01, 0.05 and 0.1")
    kto_desirable_weight: float = setting(1.0, "weight of the chosen responses")
    kto_undesirable_weight: float = setting(1.0, "weight of the rejected responses")
    baseline: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("kto_beta", "kto_desirable_weight", "kto_undesirable_weight")

    def next_baseline(self, metrics: Mapping[str, float]) -> float:
        """z0 of the next step."""
        return self.kto_beta * max(0.0, metrics[_LOG_RATIO])

    def with_baseline(self, baseline: float) -> KTO:
        """The objective with this z0."""
        return replace(self, baseline=baseline)

    def _logits(self, scores: PairScores) -> Tensor:
        """How far the chosen response is above the baseline, and the rejected one below it, [P, 2]."""
        chosen_P, rejected_P = (self.rewards(scores) - self.baseline).unbind(1)
        return torch.stack((chosen_P, -rejected_P), dim=1)

    def _weights(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.kto_desirable_weight, self.kto_undesirable_weight])

    def pair_losses(self, scores: PairScores) -> Tensor:
        """The weighted sum over both responses of 1 - sigmoid, [P]."""
        logits_PM = self._logits(scores)
        return (self._weights(logits_PM) * torch.sigmoid(-logits_PM)).sum(1)

    def pair_slopes(self, scores: PairScores) -> Tensor:
        """See `Objective`."""
        logits_PM = self._logits(scores)
        signs = self._weights(logits_PM) * logits_PM.new_tensor([-self.kto_beta, self.kto_beta])
        return signs * torch.sigmoid(logits_PM) * torch.sigmoid(-logits_PM)

    def rewards(self, scores: PairScores) -> Tensor:
        """The summed log-ratios times beta, [P, M]."""
        return self.kto_beta * scores.log_ratios_PM

    def describe(self) -> str:
        """The values of the flags."""
        weights = f"weights {self.kto_desirable_weight:g} and {self.kto_undesirable_weight:g}"
        return f"KTO: beta {self.kto_beta:g}, {weights}{self.describe_nll()}"
