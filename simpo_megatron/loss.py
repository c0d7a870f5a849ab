"""The SimPO loss on per-sequence log-probs: pure torch, no Megatron. Read this file first.

SimPO (arXiv 2405.14734, equation 6) scores a response y by its average log-probability and asks the chosen one, w, to beat
the rejected one, l, by a target margin gamma:

    r(x, y) = beta / |y| * sum_t log pi(y_t | x, y_<t)
    loss    = -log sigmoid(r_w - r_l - gamma)

gamma is absolute here, in units of reward. The paper tunes gamma / beta and TRL's `simpo_gamma` is ours; the two knobs meet in
`config.LossConfig.gamma`. Shapes: P is pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
        chosen_logps_P: average log-prob of each chosen response (sum over its tokens divided by their number), fp32 or fp64.
        rejected_logps_P: the same for the rejected responses.
        beta: scale of the rewards.
        gamma_P: target reward margin, one number or one a pair.
        loss_type: `sigmoid` (the paper's) or `hinge`, relu(1 - (r_w - r_l - gamma)), which has no label smoothing.
        label_smoothing: the probability that a pair's two members were swapped.

    Returns:
        [P] in the dtype of the log-probs.

    Raises:
        ValueError: an unknown loss type.
    """
    logits_P = beta * (chosen_logps_P - rejected_logps_P) - gamma_P
    if loss_type == "sigmoid":
        return -(1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)
    if loss_type == "hinge":
        return torch.relu(1 - logits_P)
    raise ValueError(f"loss_type {loss_type!r} is not known; use sigmoid or hinge")
