"""What the study measures of a trained model, with transformers alone.

    measure = Measure(sft_folder, train_rows, held_out_rows, max_length)
    figures = measure(folder)

The 200 held-out rows are asked greedily, and four times at temperature 1.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import torch

from examples.quickstart_report import BATCH, Checkpoint, Row

TRAIN_ROWS = 400  # training pairs that are ranked
SAMPLES = 4  # answers drawn for each held-out prompt


class Measure:
    """Measures models beside the SFT model that they were trained from.

    Args:
        sft: folder of the SFT model.
        train: training pairs; the first ones are ranked.
        held_out: pairs that no model was trained on.
        max_length: tokens of a prompt with its response, as in training.
    """

    def __init__(self, sft: Path, train: list[Row], held_out: list[Row], max_length: int) -> None:
        self.sft = Checkpoint(sft, max_length)
        self.train, self.held_out, self.max_length = train[:TRAIN_ROWS], held_out, max_length

    def __call__(self, folder: Path) -> dict[str, float]:
        """The figures of a model.

        Args:
            folder: of its Hugging Face checkpoint.

        Returns:
            * `train_ranking`, `heldout_ranking`: share of pairs whose chosen response has the higher average log-prob
            * `chosen_logp`, `rejected_logp`: average log-prob of a response token, over held-out pairs, in nats
            * `kl`: exact KL[model || SFT], mean over the response positions of the held-out chosen responses, in nats
            * `length`: tokens of an answer drawn at temperature 1; `greedy_length`: of the greedy one
            * `correct`: share of right greedy answers; `sampled_correct`: of right ones drawn. Only where rows have an
              `answer`
        """
        model = Checkpoint(folder, self.max_length)
        train, held_out = model.ranking(self.train), model.ranking(self.held_out)
        return {
            "train_ranking": _ranked(train),
            "heldout_ranking": _ranked(held_out),
            "chosen_logp": held_out[:, 0].mean().item(),
            "rejected_logp": held_out[:, 1].mean().item(),
            "kl": self.kl(model),
            **self._answers(model),
        }

    @torch.no_grad()
    def kl(self, model: Checkpoint) -> float:
        """Exact KL[model || SFT] in nats: the mean over the response positions of the held-out chosen responses."""
        total, positions = 0.0, 0
        for start in range(0, len(self.held_out), BATCH):
            chosen = [model.responses(row)[0] for row in self.held_out[start : start + BATCH]]
            logprobs, _, scored = model.logprobs(chosen)
            reference, _, _ = self.sft.logprobs(chosen)
            kl = (logprobs.exp() * (logprobs - reference)).sum(-1)
            total += kl[scored].double().sum().item()
            positions += int(scored.sum())
        return total / positions

    def _answers(self, model: Checkpoint) -> dict[str, float]:
        torch.manual_seed(0)  # the same draws for all models
        new_tokens = self.max_length // 2
        greedy = model.answers(self.held_out, new_tokens)
        drawn = [model.answers(self.held_out, new_tokens, sample=True) for _ in range(SAMPLES)]
        figures = {
            "length": fmean(len(answer) for answers in drawn for answer in answers),
            "greedy_length": fmean(map(len, greedy)),
        }
        if all("answer" in row for row in self.held_out):
            figures["correct"] = self._right(model, greedy)
            figures["sampled_correct"] = fmean(self._right(model, answers) for answers in drawn)
        return figures

    def _right(self, model: Checkpoint, answers: list[list[int]]) -> float:
        return fmean(model.is_right(row, answer) for row, answer in zip(self.held_out, answers, strict=True))


def _ranked(scores: torch.Tensor) -> float:
    """Share of pairs with the chosen response above the rejected one."""
    return (scores[:, 0] > scores[:, 1]).double().mean().item()
