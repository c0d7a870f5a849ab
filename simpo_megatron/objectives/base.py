"""What an objective is: a function of the summed log-probs of each pair. Pure torch; no Megatron, no process group.

    class Margin(Objective):             # a file of this folder, and one line in `__init__.py`
        name = "margin"
        margin_beta: float = setting(1.0, "scale of the rewards")        # the flag --margin-beta

        def rewards(self, scores): return self.margin_beta * scores.sums_PM
        def pair_losses(self, scores): ...

The head, the step, the trainer and the verifier call these methods and know nothing else of an objective.
Shapes: P pairs, M responses of a pair that are scored (2: chosen, rejected; 1: chosen alone).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from simpo_megatron.settings import Group


@dataclass(frozen=True)
class PairScores:
    """What an objective sees of some pairs; the same on all tensor- and context-parallel ranks.

    Attributes:
        sums_PM: log-probs of the responses, summed over their tokens, chosen first; fp32 or fp64, differentiable.
        lengths_PM: scored tokens of the responses, int64 or floating.
        margin_P: target reward margin that the data sets for a pair; NaN where the objective's own applies.
        weight_P: factor of the pair's loss.
        reference_sums_PM: the same sums under a reference model, without gradient; None where there are none.
    """

    sums_PM: Tensor
    lengths_PM: Tensor
    margin_P: Tensor
    weight_P: Tensor
    reference_sums_PM: Tensor | None = None

    @property
    def averages_PM(self) -> Tensor:
        """Average log-prob of a response token, in the dtype of the sums."""
        return self.sums_PM / self.lengths_PM


@dataclass(frozen=True)
class Measured:
    """What the metrics of one microbatch are computed from; nothing in it has a gradient.

    Attributes:
        scores: of the pairs of the microbatch.
        truncated_PM: bool, the response lost its end.
        rewards_PM: `Objective.rewards` of the scores.
        target_margins_P: `Objective.target_margins` of the scores.
        loss: scalar, the share of the microbatch in the loss of the global batch.
    """

    scores: PairScores
    truncated_PM: Tensor
    rewards_PM: Tensor
    target_margins_P: Tensor
    loss: Tensor

    @property
    def margins_P(self) -> Tensor:
        """Reward of the chosen response minus that of the rejected one."""
        return self.rewards_PM[:, 0] - self.rewards_PM[:, 1]


@dataclass(frozen=True)
class Metric:
    """One number of a step's report.

    Attributes:
        name: TRL's, where TRL has the metric.
        value: [P] or a scalar; it is summed over the pairs of the global batch.
        divisor: what the sum is divided by: the number of pairs, the number of chosen tokens, or nothing.
    """

    name: str
    value: Callable[[Measured], Tensor]
    divisor: Literal["pairs", "chosen_tokens", "none"] = "pairs"


LOSS_METRICS = (
    Metric("loss", lambda found: found.loss, "none"),  # `step.batch_loss` has divided its terms
    Metric("nll_loss", lambda found: -found.scores.sums_PM[:, 0], "chosen_tokens"),
)
CHOSEN_METRICS = (
    *LOSS_METRICS,
    Metric("logps/chosen", lambda found: found.scores.averages_PM[:, 0]),
    Metric("response_length/chosen", lambda found: found.scores.lengths_PM[:, 0]),
    Metric("truncated/chosen", lambda found: found.truncated_PM[:, 0]),
)
"""For objectives that score the chosen response alone."""
PAIR_METRICS = (
    *LOSS_METRICS,
    Metric("rewards/chosen", lambda found: found.rewards_PM[:, 0]),
    Metric("rewards/rejected", lambda found: found.rewards_PM[:, 1]),
    Metric("rewards/margins", lambda found: found.margins_P),
    Metric("rewards/accuracies", lambda found: found.margins_P > 0),  # strict: a tie counts as wrong
    Metric("rewards/above_gamma", lambda found: found.margins_P > found.target_margins_P),
    Metric("rewards/ties", lambda found: found.margins_P == 0),
    Metric("logps/chosen", lambda found: found.scores.averages_PM[:, 0]),
    Metric("logps/rejected", lambda found: found.scores.averages_PM[:, 1]),
    Metric("response_length/chosen", lambda found: found.scores.lengths_PM[:, 0]),
    Metric("response_length/rejected", lambda found: found.scores.lengths_PM[:, 1]),
    Metric("truncated/chosen", lambda found: found.truncated_PM[:, 0]),
    Metric("truncated/rejected", lambda found: found.truncated_PM[:, 1]),
)
"""For objectives that compare two responses."""


@dataclass(frozen=True)
class Objective(Group):
    """Base of the objectives. The fields of a subclass are its flags; its docstring is their heading in `--help`.

    Attributes:
        name: value of `--objective`.
        responses: responses of a pair that are laid out in the row and scored, M.
        metrics: what a step reports, in this order.
    """

    name: ClassVar[str]
    responses: ClassVar[int] = 2
    metrics: ClassVar[tuple[Metric, ...]] = PAIR_METRICS

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL of the chosen responses in the loss, a mean over their tokens in the global batch."""
        return 0.0

    def pair_losses(self, scores: PairScores) -> Tensor | None:
        """One loss a pair, [P], not reduced and not weighted; None where the NLL is the whole loss.

        The loss of a pair must depend on that pair alone: the head differentiates some pairs while the sums of others are 0.
        """
        raise NotImplementedError

    def rewards(self, scores: PairScores) -> Tensor:
        """Rewards of the responses, [P, M], after every factor and before any margin."""
        raise NotImplementedError

    def target_margins(self, scores: PairScores) -> Tensor:
        """The reward margin that each pair is asked for, [P]; what `rewards/above_gamma` compares with."""
        return scores.margin_P.nan_to_num(0.0)

    def describe(self) -> str:
        """One line for the start of a run: the objective and its effective values."""
        raise NotImplementedError

    def warnings(self, lr: float, num_parameters: int) -> list[str]:
        """Settings that are allowed and have ruined runs of other people.

        Args:
            lr: highest learning rate.
            num_parameters: of the model.
        """
        return []
