r"""Measures two Hugging Face checkpoints on held-out preferences with transformers alone, and plots a run.

    python examples/quickstart_report.py --before SFT --after ALIGNED --held-out heldout.jsonl \
        --metrics RUN/metrics.jsonl --plot curves.png

On two cores it takes seconds for the quick start's model, and prints a table with a column for each checkpoint.

A pair is ranked right when the chosen response has the higher average log-prob, its end token included. A greedy answer
is right when it ends with the row's `answer`. Rows without `answer` are judged by length: nearer to the chosen response
than to the rejected.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo_megatron.program import exit_code, write_report

matplotlib.use("Agg")  # draws to files; needs no screen
from matplotlib import pyplot

Row = dict[str, Any]
BATCH = 50
GREEDY_ROWS = 200


def text(response: Any) -> str:
    """The text of a response, which is a string or a list of one message."""
    return response if isinstance(response, str) else response[-1]["content"]


class Checkpoint:
    """A checkpoint in transformers, and what is measured of it on preferences.

    Args:
        folder: the Hugging Face checkpoint.
        max_length: tokens of a prompt with its response, as in training.
    """

    def __init__(self, folder: Path, max_length: int) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        ).eval()
        self.max_length = max_length

    def _ids(self, written: str) -> list[int]:
        return self.tokenizer(written, add_special_tokens=False)["input_ids"]

    def prompt(self, row: Row, longest_response: int = 0) -> list[int]:
        """Tokens of the prompt. As in training it is cut to half of `max_length` where the whole does not fit."""
        written = row["prompt"]
        if not isinstance(written, str):
            written = self.tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=True)
        ids, room = self._ids(written), self.max_length // 2
        if isinstance(row["prompt"], str) and self.tokenizer.bos_token_id not in (None, *ids[:1]):
            ids = [self.tokenizer.bos_token_id, *ids]  # as training does with plain text
        if len(ids) > room and len(ids) + longest_response > self.max_length:
            ids = [ids[0], *ids[len(ids) - room + 1 :]]
        return ids

    def responses(self, row: Row) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) tokens of the chosen and the rejected response, cut to the length of training."""
        found = [[*self._ids(text(row[name])), self.tokenizer.eos_token_id] for name in ("chosen", "rejected")]
        prompt = self.prompt(row, max(map(len, found)))
        return [(prompt, response[: self.max_length - len(prompt)]) for response in found]

    @torch.no_grad()
    def average_logprobs(self, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
        """Mean log-prob of the response tokens of each (prompt, response), [len(sequences)]."""
        width = max(len(prompt) + len(response) for prompt, response in sequences)
        ids = torch.full((len(sequences), width), self.tokenizer.eos_token_id)
        scored = torch.zeros(ids.shape, dtype=torch.bool)
        for i, (prompt, response) in enumerate(sequences):
            end = len(prompt) + len(response)
            ids[i, :end] = torch.tensor(prompt + response)
            scored[i, len(prompt) : end] = True
        logits = self.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        logprobs = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) * scored[:, 1:]
        return logprobs.sum(1) / scored.sum(1)

    @torch.no_grad()
    def answers(self, rows: list[Row], new_tokens: int, sample: bool = False) -> list[list[int]]:
        """Tokens of an answer to each row, without the end token: the greedy one, or one drawn at temperature 1."""
        prompts = [{"input_ids": self.prompt(row)} for row in rows]
        inputs = self.tokenizer.pad(prompts, return_tensors="pt")
        how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        generated = self.model.generate(**inputs, max_new_tokens=new_tokens, **how)
        answers = generated[:, inputs["input_ids"].shape[1] :].tolist()
        end = self.tokenizer.eos_token_id
        return [answer[: answer.index(end)] if end in answer else answer for answer in answers]

    def measure(self, rows: list[Row], beta: float, new_tokens: int) -> dict[str, float]:
        """The numbers of the table, in its order.

        Args:
            rows: held-out preferences.
            beta: scale of the rewards.
            new_tokens: at most so many are generated for an answer.
        """
        scores = []
        for start in range(0, len(rows), BATCH):
            sequences = [response for row in rows[start : start + BATCH] for response in self.responses(row)]
            scores.append(self.average_logprobs(sequences).view(-1, 2))
        chosen, rejected = torch.cat(scores).unbind(1)
        asked = rows[:GREEDY_ROWS]
        answers = self.answers(asked, new_tokens)
        right = [self.is_right(row, answer) for row, answer in zip(asked, answers, strict=True)]
        label = "right greedy answers" if "answer" in rows[0] else "greedy length nearer to chosen"
        return {
            "ranking accuracy": (chosen > rejected).float().mean().item(),
            "reward margin": beta * (chosen - rejected).mean().item(),
            "average log-prob, chosen": chosen.mean().item(),
            "average log-prob, rejected": rejected.mean().item(),
            "greedy length in tokens": sum(map(len, answers)) / len(answers),
            label: sum(right) / len(right),
        }

    def is_right(self, row: Row, answer: list[int]) -> bool:
        """Whether an answer ends with the row's `answer`; without one, whether its length is nearer to the chosen."""
        if "answer" in row:
            return self.tokenizer.decode(answer).rstrip(".").split()[-1:] == [row["answer"]]
        chosen, rejected = (len(self._ids(text(row[name]))) for name in ("chosen", "rejected"))
        return abs(len(answer) - chosen) < abs(len(answer) - rejected)


def print_table(before: dict[str, float], after: dict[str, float], pairs: int) -> None:
    """Prints the numbers of both checkpoints side by side."""
    table = Table("held-out", "before (SFT)", "after (SimPO)", title=f"{pairs} held-out pairs, by transformers alone")
    for name, value in before.items():
        table.add_row(name, f"{value:.3f}", f"{after[name]:.3f}")
    Console(highlight=False).print(table)


def plot(metrics: Path, file: Path) -> None:
    """Draws loss, margin and accuracy by step, of the training batches and of the held-out pairs.

    Raises:
        UserError: the file cannot be written.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (("loss", "SimPO loss"), ("rewards/margins", "reward margin"), ("rewards/accuracies", "ranking accuracy"))
    for axis, (name, title) in zip(axes, panels, strict=True):
        for key, label, style in ((name, "training batch", "-"), (f"eval/{name}", "held out", "o-")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), style, label=label, alpha=0.6 if style == "-" else 1)
        axis.set(title=title, xlabel="step")
        axis.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format=file.suffix[1:] or "png")
    write_report("--plot", file, drawn.getvalue())


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="Hugging Face checkpoint before SimPO")
    parser.add_argument("--after", type=Path, required=True, help="Hugging Face checkpoint after SimPO")
    parser.add_argument("--held-out", type=Path, required=True, help="preferences that neither was trained on")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of the SimPO run")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--beta", type=float, default=2.0, help="scale of the rewards, as in training")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of prompt and response, as in training")
    return exit_code("quickstart_report", lambda: run(parser.parse_args()))


def run(options: argparse.Namespace) -> None:
    """Measures both checkpoints, prints the table and draws the curves."""
    transformers.utils.logging.disable_progress_bar()
    rows = [json.loads(line) for line in options.held_out.read_text(encoding="utf-8").splitlines()]
    before, after = (
        Checkpoint(folder, options.max_length).measure(rows, options.beta, new_tokens=options.max_length // 2)
        for folder in (options.before, options.after)
    )
    print_table(before, after, len(rows))
    plot(options.metrics, options.plot)
    print(f"Curves: {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
