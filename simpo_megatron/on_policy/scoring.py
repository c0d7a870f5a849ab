"""Responses -> the same rows with a score for every response, block by block; `tools/score_responses.py` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.schema import is_number, shown
from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.journal import Journal
from simpo_megatron.on_policy.lengths import LengthReport
from simpo_megatron.on_policy.prompts import parse_prompt
from simpo_megatron.on_policy.scorers.base import Answered, Scorer
from simpo_megatron.program import Meter, meter


def read_responses(source: str | Path) -> Iterator[tuple[Answered, dict[str, Any]]]:
    """The rows of a file of responses, parsed and as they are, with an id each.

    Raises:
        UserError: a row has no prompt or no responses, or repeats the id of an earlier one.
    """
    seen: dict[str, str] = {}
    for where, row in read_rows(source):
        prompt = parse_prompt(row, where)
        if prompt.id in seen:
            raise UserError(f"{where}: `id` {prompt.id} is that of {seen[prompt.id]}; give each its own, or remove one")
        seen[prompt.id] = where
        responses = row.get("responses")
        if not isinstance(responses, list) or not responses:
            raise UserError(f"{where}: `responses` is {shown(responses)}; it must be a list of {{content}}")
        for number, response in enumerate(responses, start=1):
            if not isinstance(response, dict) or not isinstance(response.get("content"), str):
                raise UserError(f"{where}: response {number} is {shown(response)}; it must be {{content: a text}}")
        texts = [response["content"] for response in responses]
        yield Answered(prompt.messages, texts, prompt.columns, where), {**row, "id": prompt.id}


def made_from(row: dict[str, Any]) -> Any:
    """What a scored row was made from: the prompt, and the texts of the responses."""
    return row["prompt"], [response["content"] for response in row["responses"]]


def score_responses(source: str, scorer: Scorer, journal: Journal) -> Meter:
    """Scores those rows that are not in the journal, and adds them.

    The source is read twice, and held in memory at no time. The first reading counts what is to be done, for the time
    that is left, and finds a wrong row before the first score rather than after hours.

    Args:
        source: rows of responses.
        scorer: that gives the numbers.
        journal: scored rows go there; it is opened with `made_from`.

    Raises:
        UserError: a row or a score cannot be used, or the journal holds a row of another file.
    """
    digests = {row["id"]: journal.digest(row) for _, row in read_responses(source)}
    journal.check_source(digests, source, "prompt or other responses")
    total = len(digests.keys() - journal.done.keys())
    rows = ((answered, row) for answered, row in read_responses(source) if row["id"] not in journal.done)
    with meter(f"Scoring {source}", total) as progress:
        while block := list(islice(rows, scorer.block)):
            scores = scorer.score([answered for answered, _ in block])
            for (answered, row), numbers in zip(block, scores, strict=True):
                if wrong := [number for number in numbers if not is_number(number)]:
                    raise UserError(
                        f"{answered.where}: the scorer gave {wrong[0]}, which is no finite number; check its model"
                    )
                row["responses"] = [
                    {**response, "score": number} for response, number in zip(row["responses"], numbers, strict=True)
                ]
            journal.append([row for _, row in block])
            progress.add(len(block), LengthReport.of(row for _, row in block).tokens)
    return progress
