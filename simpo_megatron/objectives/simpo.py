"""SimPO: the formula, its flags and its rewards. Pure torch. Read this file first.

SimPO (arXiv 2405.14734, equation 6) scores a response y by its average log-probability. The chosen response w must beat
the rejected response l by a target margin gamma:

    r(x, y) = beta / |y| * sum_t log pi(y_t | x, y_<t)
    loss    = -log sigmoid(r_w - r_l - gamma)

The paper's ablations are `--simpo-gamma 0` and `--no-simpo-length-normalization`, which leaves out the factor 1 / |y|.

`simpo_loss` is this formula, and `simpo_slopes` its derivative.

gamma is absolute, in units of reward. The paper tunes the ratio gamma / beta; TRL's `simpo_gamma` is the absolute
gamma. Either flag sets the margin, and `SimPO.gamma` reads both.

Shapes: P pairs, M scored responses of a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from simpo_megatron.objectives.base import Objective, sigmoid_loss, sigmoid_slope
from simpo_megatron.objectives.measured import PairScores
from simpo_megatron.settings import require, setting


def simpo_loss(
    chosen_logps_P: Tensor,
    rejected_logps_P: Tensor,
    *,
    beta: float,
    gamma_P: Tensor | float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """One loss a pair, not reduced.

    Args:
        chosen_logps_P: average log-prob of each chosen response (sum over its tokens divided by their number), fp32 or
            fp64.
        rejected_logps_P: the same for the rejected responses.
        beta: scale of the rewards.
        gamma_P: target reward margin, one number or one a pair.
        loss_type: `sigmoid` (the paper's) or `hinge`: relu(1 - (r_w - r_l - gamma)), without label smoothing.
        label_smoothing: the probability that the two responses of a pair were swapped.

    Returns:
        [P] in the dtype of the log-probs.

    Raises:
        ValueError: an unknown loss type.
    """
    logits_P = beta * (chosen_logps_P - rejected_logps_P) - gamma_P
    if loss_type == "sigmoid":
        return sigmoid_loss(logits_P, label_smoothing)
    if loss_type == "hinge":
        return torch.relu(1 - logits_P)
    raise ValueError(f"loss_type {loss_type!r} is not known; use sigmoid or hinge")


def simpo_slopes(
    chosen_logps_P: Tensor,
    rejected_logps_P: Tensor,
    *,
    beta: float,
    gamma_P: Tensor | float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The derivative of `simpo_loss`, which has the same arguments, with respect to the average of the chosen response.

    With respect to the average of the rejected response it is the negative.

    Returns:
        [P] in the dtype of the log-probs.
    """
    logits_P = beta * (chosen_logps_P - rejected_logps_P) - gamma_P
    if loss_type == "hinge":
        return -beta * (logits_P < 1).to(logits_P.dtype)
    return beta * sigmoid_slope(logits_P, label_smoothing)


@dataclass(frozen=True)
class SimPO(Objective):
    """SimPO."""

    name: ClassVar[str] = "simpo"
    drops: ClassVar[Mapping[str, str]] = {
        "simpo_gamma": "simpo_gamma_beta_ratio",
        "simpo_gamma_beta_ratio": "simpo_gamma",
        "simpo_sft_weight": "nll_weight",
        "nll_weight": "simpo_sft_weight",
    }
    simpo_beta: float = setting(2.0, "scale of the rewards")
    simpo_gamma: float | None = setting(None, "target reward margin, absolute")
    simpo_gamma_beta_ratio: float | None = setting(None, "target reward margin divided by beta; default 0.5")
    simpo_loss_type: Literal["sigmoid", "hinge"] = setting("sigmoid", "sigmoid is the paper's")
    simpo_label_smoothing: float = setting(0.0, "probability that the two responses of a pair were swapped")
    simpo_length_normalization: bool = setting(True, "the reward is an average over tokens; off: a sum (an ablation)")
    simpo_sft_weight: float = setting(0.0, "the older name of --nll-weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("simpo_beta")
        self.not_negative("simpo_sft_weight")
        require(
            self.simpo_gamma is None or self.simpo_gamma_beta_ratio is None,
            "--simpo-gamma and --simpo-gamma-beta-ratio set the same margin (gamma = ratio * beta); give one of them",
        )
        require(
            not self.simpo_sft_weight or self.nll_weight is None,
            "--simpo-sft-weight is the older name of --nll-weight; give one of them",
        )
        require(
            0 <= self.simpo_label_smoothing < 0.5,
            f"--simpo-label-smoothing {self.simpo_label_smoothing} must be at least 0 and less than 0.5",
        )
        require(
            not (self.simpo_label_smoothing and self.simpo_loss_type == "hinge"),
            "--simpo-label-smoothing has no meaning with --simpo-loss-type hinge; drop one of them",
        )

    @property
    def gamma(self) -> float:
        """The target reward margin, absolute, from whichever of the two flags was given."""
        if self.simpo_gamma is not None:
            return self.simpo_gamma
        ratio = 0.5 if self.simpo_gamma_beta_ratio is None else self.simpo_gamma_beta_ratio
        return ratio * self.simpo_beta

    @property
    def effective_nll_weight(self) -> float:
        """The value of --nll-weight or --simpo-sft-weight. The paper's SimPO has no NLL term."""
        return self.simpo_sft_weight if self.nll_weight is None else self.nll_weight

    def pair_losses(self, scores: PairScores) -> Tensor:
        """The value of `simpo_loss` for the average log-probs (without length normalization the sums), [P]."""
        return simpo_loss(*self._logps(scores).unbind(1), **self._settings(scores))

    def pair_slopes(self, scores: PairScores) -> Tensor:
        """The derivative of `pair_losses` with respect to the sums, [P, 2]: `simpo_slopes` by the length."""
        slopes_P = simpo_slopes(*self._logps(scores).unbind(1), **self._settings(scores))
        slopes_PM = torch.stack((slopes_P, -slopes_P), dim=1)
        return slopes_PM / scores.lengths_PM if self.simpo_length_normalization else slopes_PM

    def _logps(self, scores: PairScores) -> Tensor:
        """What is multiplied by beta, [P, M]."""
        return scores.averages_PM if self.simpo_length_normalization else scores.sums_PM

    def _settings(self, scores: PairScores) -> dict[str, Any]:
        """The keyword arguments of `simpo_loss` and `simpo_slopes`."""
        return {
            "beta": self.simpo_beta,
            "gamma_P": self.target_margins(scores),
            "loss_type": self.simpo_loss_type,
            "label_smoothing": self.simpo_label_smoothing,
        }

    def rewards(self, scores: PairScores) -> Tensor:
        """The average log-probs (without length normalization the sums) times beta, [P, M], without gamma."""
        return self.simpo_beta * self._logps(scores)

    def target_margins(self, scores: PairScores) -> Tensor:
        """The margin that the data sets for a pair, gamma for the other pairs, [P]."""
        return torch.where(scores.margin_P.isnan(), self.gamma, scores.margin_P)

    def describe(self) -> str:
        """The values of beta, gamma, gamma / beta, the loss type and the NLL term."""
        return (
            f"SimPO: beta {self.simpo_beta:g}, gamma {self.gamma:g} (gamma / beta {self.gamma / self.simpo_beta:g}), "
            f"{self.simpo_loss_type}{'' if self.simpo_length_normalization else ', sums'}{self.describe_nll()}"
        )

    def warnings(self, lr: float, num_parameters: int) -> list[str]:
        """Sentences about the learning rate, beta, gamma and the NLL term; see `Objective.warnings`."""
        found = []
        if lr >= 1e-5 and num_parameters >= 1e9:
            found.append(f"--lr {lr:g}: SimPO on models of billions of parameters collapses from 1e-5 on")
        if self.simpo_beta < 1 and self.simpo_length_normalization:
            found.append(f"--simpo-beta {self.simpo_beta:g}: SimPO uses 2 to 10, DPO's 0.1 is too small here")
        if self.gamma > self.simpo_beta:
            found.append(f"gamma {self.gamma:g} exceeds beta {self.simpo_beta:g}: is it a gamma given as a ratio?")
        if weight := self.effective_nll_weight:
            given = "--nll-weight" if self.nll_weight is not None else "--simpo-sft-weight"
            found.append(f"{given} {weight:g}: the paper's SimPO has no NLL term")
        return found
