"""What the study measures of a trained model, with transformers alone.

    measure = Measure(plan)
    figures = measure(folder, objective)

Rankings, rewards and KL are those of `simpo_megatron.diagnose`.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from examples.quickstart_report import Checkpoint, Row
from examples.study.plan import Plan
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.diagnose import figures, load_model, score
from simpo_megatron.objectives import Objective

SAMPLES = 2  # answers drawn for each held-out prompt


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Measure:
    """Measures models beside the SFT model that they were trained from.

    Args:
        plan: of the study, whose data and SFT model are complete.
    """

    def __init__(self, plan: Plan) -> None:
        self.max_length = plan.max_length
        self.sft = load_model("--reference-checkpoint", plan.sft)
        self.ranked, self.held_out = (PreparedPairs(str(plan.prefix(name))) for name in ("ranked", "heldout"))
        self.asked = read_rows(plan.data("heldout"))

    def __call__(self, folder: Path, objective: Objective) -> dict[str, float]:
        """The figures of a model.

        Args:
            folder: of its Hugging Face checkpoint.
            objective: that it was trained with.

        Returns:
            * `train_ranking`, `heldout_ranking`: share of pairs whose chosen response has the higher average log-prob
            * `reward_accuracy`: share of held-out pairs whose chosen response has the higher reward
            * `chosen_logp`: average log-prob of the held-out chosen responses, in nats a token
            * `kl`: exact KL[model || SFT] at the response positions of the held-out chosen responses, in nats a token
            * `length`: tokens of an answer drawn at temperature 1; `greedy_length`: of the greedy one
            * `correct`: share of right greedy answers; `sampled_correct`: of right ones drawn. Only where rows have an
              `answer`
        """
        model = load_model("--hf-checkpoint", folder)
        train, held_out = (figures(score(model, self.sft, pairs), objective) for pairs in (self.ranked, self.held_out))
        return {
            "train_ranking": train["likelihood_accuracy"]["policy"],
            "heldout_ranking": held_out["likelihood_accuracy"]["policy"],
            "reward_accuracy": held_out["reward_accuracy"],
            "chosen_logp": held_out["average_logp"]["policy"]["chosen"],
            "kl": held_out["kl_exact"]["chosen"],
            **self._answers(Checkpoint(folder, self.max_length)),
        }

    def _answers(self, model: Checkpoint) -> dict[str, float]:
        torch.manual_seed(0)  # the same draws for all models
        new_tokens = self.max_length // 2
        greedy = model.answers(self.asked, new_tokens)
        drawn = [model.answers(self.asked, new_tokens, sample=True) for _ in range(SAMPLES)]
        found: dict[str, Any] = {
            "length": fmean(len(answer) for answers in drawn for answer in answers),
            "greedy_length": fmean(map(len, greedy)),
        }
        if all("answer" in row for row in self.asked):
            found["correct"] = self._right(model, greedy)
            found["sampled_correct"] = fmean(self._right(model, answers) for answers in drawn)
        return found

    def _right(self, model: Checkpoint, answers: list[list[int]]) -> float:
        return fmean(model.is_right(row, answer) for row, answer in zip(self.asked, answers, strict=True))
