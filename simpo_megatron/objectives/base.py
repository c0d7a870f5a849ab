"""What an objective is: a function from the summed log-probs of a pair to its loss. Pure torch; no Megatron.

    class CPO(RewardObjective):          # a file of this folder, and one line in `__init__.py`
        name = "cpo"                                                    # --objective cpo
        cpo_beta: float = setting(0.1, "scale of the rewards")          # the flag --cpo-beta

        def reward_scale(self, scores): return self.cpo_beta            # of the summed log-probs

The head, the step, the trainer and the verifier call the methods of `Objective` and know nothing else of an objective.
README.md in this folder has the whole example.

Shapes: P pairs, M scored responses of a pair (2: chosen and rejected; 1: chosen alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from simpo_megatron.objectives.measured import PAIR_METRICS, Metric, PairScores
from simpo_megatron.settings import Group, setting

Normalizer = Literal["token", "pair"]


def sigmoid_loss(logits_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid of the logits; smoothed: the mean over a pair whose responses were swapped with that probability."""
    return -(1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)


def sigmoid_slope(logits_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The derivative of `sigmoid_loss` with respect to the logits."""
    # sigmoid(-z), not 1 - sigmoid(z), which would lose the small slopes of pairs with a large margin
    return label_smoothing * torch.sigmoid(logits_P) - (1 - label_smoothing) * torch.sigmoid(-logits_P)


@dataclass(frozen=True, kw_only=True)
class Objective(Group):
    """The base of all objectives.

    The fields of a subclass are its flags. The first line of its docstring is their heading in `--help`. The fields of
    this class are flags of all objectives.

    Attributes:
        name: the value of `--objective`.
        responses: how many responses of a pair are laid out in the row and scored, M.
        metrics: what a step reports, in this order.
        drops: pairs of settings of which one replaces the other. A flag that is a key here drops the value that the
            YAML file or the preset gives to the other setting.
        needs_reference: the loss compares with log-probs of a reference model.
        needs_baseline: the loss compares with a statistic of the pairs of the previous step (`next_baseline`).
        own_nll_weight: the weight of the NLL term where --nll-weight is not given.
        own_nll_normalizer: its divisor where --nll-normalizer is not given.
        nll_weight: of --nll-weight, or None. `nll_factor` has the value in force.
        nll_normalizer: of --nll-normalizer, or None.
    """

    name: ClassVar[str]
    responses: ClassVar[int] = 2
    metrics: ClassVar[tuple[Metric, ...]] = PAIR_METRICS
    drops: ClassVar[Mapping[str, str]] = {}
    needs_reference: ClassVar[bool] = False
    needs_baseline: ClassVar[bool] = False
    own_nll_weight: ClassVar[float] = 0.0
    own_nll_normalizer: ClassVar[Normalizer] = "token"
    nll_weight: float | None = setting(
        None,
        "weight of the negative log-likelihood (NLL) of the chosen responses (default: 1 for sft, cpo, slic and rrhf; "
        "0 for the others)",
    )
    nll_normalizer: Normalizer | None = setting(
        None,
        "divide the NLL of the global batch by its chosen tokens, as TRL, or by its pairs, as the tables of the papers "
        "(default: pair for slic and rrhf, token for the others)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.not_negative("nll_weight")

    def __init_subclass__(cls, **options: Any) -> None:
        """Where a subclass has a loss of its own and no slopes of its own, those of its parent would be wrong."""
        super().__init_subclass__(**options)
        if "pair_losses" in vars(cls) and "pair_slopes" not in vars(cls):
            cls.pair_slopes = Objective.pair_slopes

    @property
    def effective_nll_weight(self) -> float:
        """The weight of the NLL term: --nll-weight, or that of the objective."""
        return self.own_nll_weight if self.nll_weight is None else self.nll_weight

    def nll_factor(self, pairs: int, chosen_tokens: float) -> float:
        """The factor of the summed negative log-likelihood of the chosen responses in the loss.

        Args:
            pairs: of the global batch.
            chosen_tokens: scored tokens of its chosen responses.
        """
        normalizer = self.nll_normalizer or self.own_nll_normalizer
        return self.effective_nll_weight / (pairs if normalizer == "pair" else chosen_tokens)

    def describe_nll(self) -> str:
        """The NLL term for `describe`, with a comma before it; empty where the weight is 0."""
        weight, normalizer = self.effective_nll_weight, self.nll_normalizer or self.own_nll_normalizer
        return f", NLL {weight:g} a {normalizer}" if weight else ""

    def pair_losses(self, scores: PairScores) -> Tensor | None:
        """The loss of each pair, [P], neither weighted nor summed; None if the NLL term is the whole loss.

        The loss of a pair must depend on that pair alone. The head relies on it: it differentiates the loss of some
        pairs while the sums of the pairs behind them are still 0.
        """
        raise NotImplementedError

    def pair_slopes(self, scores: PairScores) -> Tensor | None:
        """The derivative of each pair's loss with respect to its sums, [P, M], without gradient.

        None, unless a subclass gives the closed form: then the fused head differentiates `pair_losses` with autograd,
        once for each slab. The closed form saves that time. It must be the derivative of `pair_losses`; compare both in
        fp64, as `tests/objectives/test_slopes.py` does.
        """
        return None

    def rewards(self, scores: PairScores) -> Tensor:
        """The reward of each response, [P, M], with every factor and without any margin."""
        raise NotImplementedError

    def target_margins(self, scores: PairScores) -> Tensor:
        """The reward margin that each pair is to exceed, [P]. The metric `rewards/above_gamma` compares with it."""
        return scores.margin_P.nan_to_num(0.0)

    def next_baseline(self, metrics: Mapping[str, float]) -> float:
        """A statistic of a step that the loss of the next step compares with; 0 where there is none.

        Args:
            metrics: of the step, over the global batch.
        """
        return 0.0

    def with_baseline(self, baseline: float) -> Objective:
        """The objective for the step after the one that gave this `next_baseline`."""
        return self

    def describe(self) -> str:
        """One line for the start of a run: the objective and its effective values."""
        raise NotImplementedError

    def warnings(self, lr: float, num_parameters: int) -> list[str]:
        """Sentences about settings that are allowed but are known to ruin runs.

        Args:
            lr: the highest learning rate.
            num_parameters: of the model.
        """
        return []


@dataclass(frozen=True)
class RewardObjective(Objective):
    """An objective whose loss depends on the margin alone: the reward of the chosen response minus the other.

    The reward is the summed log-prob (with `needs_reference` the log-ratio) times `reward_scale`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Where a subclass has a loss of the margin and no slope of it, the head differentiates with autograd."""
        super().__init_subclass__(**options)
        if "margin_losses" in vars(cls) and "margin_slopes" not in vars(cls):
            cls.pair_slopes = Objective.pair_slopes

    def reward_scale(self, scores: PairScores) -> Tensor | float:
        """The reward of one unit of summed log-prob: a number, or [P, M]."""
        raise NotImplementedError

    def margin_losses(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """The loss of each pair, [P], from its margin: -log sigmoid of it, unless a subclass has another."""
        return sigmoid_loss(margins_P)

    def margin_slopes(self, margins_P: Tensor, scores: PairScores) -> Tensor:
        """The derivative of `margin_losses` with respect to the margin, [P]."""
        return sigmoid_slope(margins_P)

    def rewards(self, scores: PairScores) -> Tensor:
        """See `Objective`."""
        return self.reward_scale(scores) * (scores.log_ratios_PM if self.needs_reference else scores.sums_PM)

    def pair_losses(self, scores: PairScores) -> Tensor:
        """See `Objective`."""
        return self.margin_losses(self._margins(scores), scores)

    def pair_slopes(self, scores: PairScores) -> Tensor | None:
        """See `Objective`."""
        slopes_P = self.margin_slopes(self._margins(scores), scores)
        return torch.stack((slopes_P, -slopes_P), dim=1) * self.reward_scale(scores)

    def _margins(self, scores: PairScores) -> Tensor:
        chosen_P, rejected_P = self.rewards(scores).unbind(1)
        return chosen_P - rejected_P
