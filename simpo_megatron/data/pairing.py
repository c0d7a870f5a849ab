"""Several scored responses to a prompt -> preference pairs; `tools/build_pairs.py` runs it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from simpo_megatron.data.reading import Row
from simpo_megatron.data.schema import NUMBER, is_number, shown
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_path

# best-worst: one pair a prompt, as in the paper; best-random: the best response and any other; all: every two of them.
Strategy = Literal["best-worst", "best-random", "all"]


@dataclass
class PairingReport:
    """Counts of what became of the prompts.

    Attributes:
        prompts: read.
        pairs: built.
        too_few: prompts with fewer than two responses.
        no_gap: prompts without a pair of the score gap.
    """

    prompts: int = 0
    pairs: int = 0
    too_few: int = 0
    no_gap: int = 0

    def summary(self, path: str | Path) -> str:
        """The counts in one line; `path` is the file that was written."""
        return f"{path}: {self.pairs} pairs of {self.prompts} prompts; left out {self._left_out()}"

    def nothing(self, source: str | Path, min_score_gap: float) -> UserError:
        """The error for a source without a pair.

        Args:
            source: that was read.
            min_score_gap: that was asked for.
        """
        fix = "give each prompt two responses with different scores"
        if self.no_gap and min_score_gap:
            fix = f"lower --min-score-gap {min_score_gap:g}, or {fix}"
        return UserError(f"{source}: no pair of {self.prompts} prompts: left out {self._left_out()}; {fix}")

    def _left_out(self) -> str:
        return f"{self.no_gap} prompts without the score gap, {self.too_few} with fewer than two responses"


def build_pairs(
    rows: Iterable[Row], report: PairingReport, strategy: Strategy, min_score_gap: float, seed: int
) -> Iterator[dict[str, Any]]:
    """Builds rows of pairs in the UltraFeedback-binarized schema.

    Args:
        rows: with `prompt` (string or messages) and `responses` ({"content": str, "score": number, ...}).
        report: counts are added to it.
        strategy: which responses make a pair.
        min_score_gap: least difference of the two scores; scores that are equal make no pair in any case.
        seed: `best-random` draws from (seed, row).

    Raises:
        UserError: a row is of another form; its place is named.
    """
    for number, (where, row) in enumerate(rows):
        prompt, responses = _read(row, where)
        report.prompts += 1
        if len(responses) < 2:
            report.too_few += 1
            continue
        found = [
            (chosen, rejected)
            for chosen, rejected in _candidates(responses, strategy)
            if chosen[1] > rejected[1] and chosen[1] - rejected[1] >= min_score_gap
        ]
        if strategy == "best-random" and found:
            found = [random.Random(f"{seed}/{number}").choice(found)]
        report.no_gap += not found
        report.pairs += len(found)
        for chosen, rejected in found:
            yield {
                "prompt": prompt[-1]["content"],
                "chosen": [*prompt, {"role": "assistant", "content": chosen[0]}],
                "rejected": [*prompt, {"role": "assistant", "content": rejected[0]}],
                "score_chosen": chosen[1],
                "score_rejected": rejected[1],
            }


def write_pairs(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes JSON Lines beside `path` and moves them there at the end.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise cannot_write(f"--output {path}", error, "choose another file") from error


def _candidates(
    responses: list[tuple[str, float]], strategy: Strategy
) -> Iterable[tuple[tuple[str, float], tuple[str, float]]]:
    """Pairs of (text, score), the better response first; responses with equal scores keep the order of the row."""
    ranked = sorted(responses, key=lambda response: -response[1])
    if strategy == "best-worst":
        return [(ranked[0], ranked[-1])]
    if strategy == "best-random":
        return [(ranked[0], other) for other in ranked[1:]]
    return combinations(ranked, 2)


def _read(row: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], list[tuple[str, float]]]:
    prompt, responses = row.get("prompt"), row.get("responses")
    if isinstance(prompt, str) and prompt:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt or not all(_is_message(message) for message in prompt):
        raise UserError(f"{where}: `prompt` is {_found(row, 'prompt')}; it must be a text or a list of messages")
    if not isinstance(responses, list):
        raise UserError(f"{where}: `responses` is {_found(row, 'responses')}; it must be a list of {{content, score}}")
    found = []
    for number, response in enumerate(responses, start=1):
        fields = response if isinstance(response, dict) else {}
        content, score = fields.get("content"), fields.get("score")
        if not isinstance(content, str):
            raise UserError(
                f"{where}: response {number}: `content` is {_found(fields, 'content')}; give a text, or remove the "
                "response"
            )
        if not is_number(score):
            raise UserError(
                f"{where}: response {number}: `score` is {_found(fields, 'score')}; give {NUMBER}, or remove the "
                "response"
            )
        found.append((content, float(score)))
    return prompt, found


def _found(columns: dict[str, Any], name: str) -> str:
    return shown(columns[name]) if name in columns else "missing"


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
