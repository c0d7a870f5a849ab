"""Verdicts of a model that compares two responses, and scores from them.

The judge sees each two responses twice, in both orders, since judges prefer a place. Two equal verdicts count as one
win; two that contradict each other, or a tie, as half a win for each. The score of a response is its share of wins. n
responses need n (n - 1) requests a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from simpo_megatron.data.schema import Message
from simpo_megatron.on_policy.http_client import on_threads
from simpo_megatron.on_policy.scorers.base import Answered
from simpo_megatron.on_policy.scorers.settings import JudgeSettings

PROMPT = """Compare two answers to the last message of a conversation. Judge whether they are right, whether they do \
what was asked, and whether they are clear. Do not prefer an answer because it is longer or because it comes first.

[Conversation]
{conversation}

[Answer A]
{first}

[Answer B]
{second}

[End]
Explain your judgement in a few sentences. Then end with exactly one of [[A]], [[B]] or [[C]]: answer A is better, \
answer B is better, or they are equally good."""

_WINS = {"A": 1.0, "B": 0.0, "C": 0.5}


class Judge:
    """A model behind a server.

    Args:
        settings: of the server.

    Raises:
        UserError: no server answers.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings, self._client = settings, settings.client()
        self.model = self._client.model(settings.judge_model)

    def compare(self, questions: Sequence[tuple[list[Message], str, str]]) -> list[float]:
        """How often the first of two responses wins, over both orders: 0, 0.25, 0.5, 0.75 or 1.

        Args:
            questions: prompt, first and second response.

        Raises:
            UserError: the server fails.
        """
        asked = [texts for prompt, one, other in questions for texts in ((prompt, one, other), (prompt, other, one))]
        wins = on_threads(lambda texts: self._ask(*texts), asked, self._settings.judge_concurrency)
        return [(first + 1 - second) / 2 for first, second in zip(wins[::2], wins[1::2], strict=True)]

    def _ask(self, prompt: list[Message], first: str, second: str) -> float:
        conversation = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        content = PROMPT.format(conversation=conversation, first=first, second=second)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": self._settings.judge_max_tokens,
        }
        return self._client.post("chat/completions", body, read_verdict)


def read_verdict(reply: dict[str, Any]) -> float:
    """1, 0 or 0.5 from the last verdict in a reply.

    Raises:
        ValueError: there is none, so the request is sent again.
    """
    found = re.findall(r"\[\[([ABC])\]\]", reply["choices"][0]["message"]["content"])
    if not found:
        raise ValueError("the judge gave no verdict [[A]], [[B]] or [[C]]")
    return _WINS[found[-1]]


class JudgeScorer:
    """See `base.Scorer`."""

    def __init__(self, settings: JudgeSettings) -> None:
        self._judge = Judge(settings)
        self.block = max(1, settings.judge_concurrency // 4)

    @classmethod
    def check(cls, settings: JudgeSettings) -> None:
        """See `base.Scorer`. The server may be started later."""
        settings.client()

    def about(self) -> dict[str, Any]:
        """See `base.Scorer`."""
        return {"judge_model": self._judge.model}

    def score(self, rows: Sequence[Answered]) -> list[list[float]]:
        """See `base.Scorer`."""
        pairs = [
            (number, one, other)
            for number, row in enumerate(rows)
            for one, other in combinations(range(len(row.responses)), 2)
        ]
        wins = self._judge.compare(
            [(rows[number].prompt, rows[number].responses[i], rows[number].responses[j]) for number, i, j in pairs]
        )
        scores = [[0.0] * len(row.responses) for row in rows]
        for (number, i, j), win in zip(pairs, wins, strict=True):
            others = len(rows[number].responses) - 1
            scores[number][i] += win / others
            scores[number][j] += (1 - win) / others
        return scores
