"""The numbers of a diagnosis, from the scores of two models. NumPy, and the rewards of an objective.

    found = figures(scored, OBJECTIVES["dpo"]())       # nested dictionaries of numbers, for JSON

README.md in this folder says what each number means. A correlation that does not exist is None.

Shapes: P pairs, M = 2 responses of a pair, chosen first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from simpo_megatron.diagnose.lengths import by_length_difference, spearman
from simpo_megatron.diagnose.scoring import Scored
from simpo_megatron.objectives import Objective, PairScores

RESPONSES = ("chosen", "rejected")


def figures(scored: Scored, objective: Objective) -> dict[str, Any]:
    """The numbers of a diagnosis.

    Args:
        scored: of the pairs.
        objective: whose reward is compared with the likelihood; `rewards_PM` of it.
    """
    rewards_PM, lengths_PM = rewards_of(scored, objective), scored.lengths
    averages = {"policy": scored.policy_sums / lengths_PM, "reference": scored.reference_sums / lengths_PM}
    higher = {name: _higher(values) for name, values in averages.items()}
    by_reward = _higher(rewards_PM)
    differences_P = lengths_PM[:, 0] - lengths_PM[:, 1]
    return {
        "pairs": len(lengths_PM),
        "tokens": _sides(lengths_PM.mean(axis=0)),
        "kl_exact": _kl(scored.kl_sums, lengths_PM, per_token=True),
        "kl_on_given_text": _kl(scored.policy_sums - scored.reference_sums, lengths_PM, per_token=False),
        "average_logp": {name: _sides(values.mean(axis=0)) for name, values in averages.items()},
        "reward": _sides(rewards_PM.mean(axis=0)),
        "reward_accuracy": float(by_reward.mean()),
        "likelihood_accuracy": {name: float(values.mean()) for name, values in higher.items()},
        "rankings": {
            "both": int((by_reward & higher["policy"]).sum()),
            "reward_alone": int((by_reward & ~higher["policy"]).sum()),
            "likelihood_alone": int((~by_reward & higher["policy"]).sum()),
            "neither": int((~by_reward & ~higher["policy"]).sum()),
        },
        "length_spearman": {
            **{name: _correlation(values, lengths_PM) for name, values in averages.items()},
            "reward": _correlation(rewards_PM, lengths_PM),
            "margin": _correlation(rewards_PM[:, 0] - rewards_PM[:, 1], differences_P),
        },
        "margin_by_length_difference": [
            vars(one) for one in by_length_difference(rewards_PM[:, 0] - rewards_PM[:, 1], differences_P)
        ],
    }


def rewards_of(scored: Scored, objective: Objective) -> np.ndarray:
    """The rewards that the objective gives to the policy's responses, float64 [P, M]."""
    sums, lengths, known = map(torch.from_numpy, (scored.policy_sums, scored.lengths, scored.reference_sums))
    return objective.rewards(PairScores.of_sums(sums, lengths, known)).numpy()


def _higher(values_PM: np.ndarray) -> np.ndarray:
    """Where the chosen response has the higher value; a tie is not counted, as in `rewards/accuracies`."""
    return values_PM[:, 0] > values_PM[:, 1]


def _sides(values_M: np.ndarray) -> dict[str, float]:
    return dict(zip(RESPONSES, map(float, values_M), strict=True))


def _kl(sums_PM: np.ndarray, lengths_PM: np.ndarray, per_token: bool) -> dict[str, float]:
    """Means by token or by response: of both sides, and of each."""
    counts_PM = lengths_PM if per_token else np.ones_like(lengths_PM)
    return {"all": float(sums_PM.sum() / counts_PM.sum()), **_sides(sums_PM.sum(axis=0) / counts_PM.sum(axis=0))}


def _correlation(values: np.ndarray, lengths: np.ndarray) -> float | None:
    found = spearman(values.ravel(), lengths.ravel())
    return None if math.isnan(found) else found
