"""Several scored responses to a prompt -> preference pairs; `tools/build_pairs.py` runs it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simpo_megatron.data.reading import Row
from simpo_megatron.data.schema import NUMBER, check_json, check_unicode, is_number, prompt_messages, shown
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_path
from simpo_megatron.settings import Group, setting


@dataclass(frozen=True, kw_only=True)
class PairingOptions(Group):
    """How responses become pairs."""

    strategy: Literal["best-worst", "best-random", "all"] = setting(
        "best-worst",
        "best-worst: one pair a prompt, as in the paper; best-random: the best response and any other; all: every two",
    )
    min_score_gap: float = setting(0.0, "least difference of the two scores; equal scores make no pair in any case")
    truncated_chosen: bool = setting(
        False, "a response that was cut (finish_reason length) may be the chosen one of a pair"
    )
    margin_scale: float | None = setting(
        None, "write the column `margin`, the target reward margin of the pair: X times the difference of the scores"
    )
    seed: int = setting(1234, "of best-random")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.not_negative("min_score_gap")
        self.positive("margin_scale")


@dataclass
class PairingReport:
    """Counts of what became of the prompts.

    Attributes:
        prompts: read.
        pairs: built.
        repeated: rows left out because an earlier one has the same prompt, responses and scores.
        merged: responses that repeat another response to the prompt.
        too_few: prompts with fewer than two different responses.
        all_cut: prompts without a whole response that could be chosen.
        no_gap: prompts without a pair of the score gap.
        undecided: pairs left out because the judge preferred neither response.
        reversed: pairs left out because the judge preferred their rejected response.
        flipped: pairs turned round for that reason.
    """

    prompts: int = 0
    pairs: int = 0
    repeated: int = 0
    merged: int = 0
    too_few: int = 0
    all_cut: int = 0
    no_gap: int = 0
    undecided: int = 0
    reversed: int = 0
    flipped: int = 0

    def summary(self, path: str | Path) -> str:
        """The counts in one line; `path` is the file that was written."""
        merged = f"; merged {self.merged} responses that repeat another" if self.merged else ""
        flipped = f"; turned {self.flipped} pairs round" if self.flipped else ""
        return f"{path}: {self.pairs} pairs of {self.prompts} prompts; left out {self._left_out()}{merged}{flipped}"

    def nothing(self, source: str | Path, min_score_gap: float) -> UserError:
        """The error for a source without a pair.

        Args:
            source: that was read.
            min_score_gap: that was asked for.
        """
        fix = "give each prompt two responses with different texts and scores"
        if self.no_gap and min_score_gap:
            fix = f"lower --min-score-gap {min_score_gap:g}, or {fix}"
        elif self.all_cut:
            fix = "generate with a higher --max-new-tokens, or use --truncated-chosen"
        return UserError(f"{source}: no pair of {self.prompts} prompts: left out {self._left_out()}; {fix}")

    def _left_out(self) -> str:
        parts = [
            f"{self.no_gap} prompts whose scores are equal or too close",
            f"{self.too_few} with fewer than two different responses",
        ]
        parts += [f"{self.repeated} that repeat an earlier row"] if self.repeated else []
        parts += [f"{self.all_cut} without a whole response to choose"] if self.all_cut else []
        parts += [f"{self.undecided} pairs that the judge could not decide"] if self.undecided else []
        parts += [f"{self.reversed} pairs of which it prefers the rejected response"] if self.reversed else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Scored:
    """A response with its score.

    Attributes:
        content: the text.
        score: a higher one is better.
        cut: it ended at the limit of tokens.
    """

    content: str
    score: float
    cut: bool


def build_pairs(rows: Iterable[Row], report: PairingReport, options: PairingOptions) -> Iterator[dict[str, Any]]:
    """Builds rows of pairs in the UltraFeedback-binarized schema.

    Args:
        rows: with `prompt` (string or messages) and `responses` ({"content": str, "score": number, ...}).
        report: counts are added to it.
        options: of the user. `best-random` draws from (seed, row).

    Raises:
        UserError: a row is of another form; its place is named.
    """
    seen: set[bytes] = set()
    for number, (where, row) in enumerate(rows):
        prompt = prompt_messages(row.get("prompt"), f"{where}: `prompt`")
        check_json(prompt, f"{where}: `prompt`")
        responses = _read(row, where)
        report.prompts += 1
        key = hashlib.blake2b(repr((prompt, responses)).encode(), digest_size=16).digest()
        if key in seen:
            report.repeated += 1
            continue
        seen.add(key)
        different = _merged(responses)
        report.merged += len(responses) - len(different)
        if len(different) < 2:
            report.too_few += 1
            continue
        ranked = sorted(different, key=lambda response: -response.score)
        wide = [
            (chosen, rejected)
            for position, chosen in enumerate(ranked)
            for rejected in ranked[position + 1 :]
            if chosen.score > rejected.score and chosen.score - rejected.score >= options.min_score_gap
        ]
        whole = [pair for pair in wide if options.truncated_chosen or not pair[0].cut]
        report.no_gap += not wide
        report.all_cut += bool(wide) and not whole
        found = _picked(whole, options, number)
        report.pairs += len(found)
        for chosen, rejected in found:
            pair: dict[str, Any] = {
                "prompt": prompt[-1]["content"],
                "chosen": [*prompt, {"role": "assistant", "content": chosen.content}],
                "rejected": [*prompt, {"role": "assistant", "content": rejected.content}],
                "score_chosen": chosen.score,
                "score_rejected": rejected.score,
            }
            if options.margin_scale is not None:
                pair["margin"] = options.margin_scale * (chosen.score - rejected.score)
            yield pair


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


def _picked(pairs: list[tuple[Scored, Scored]], options: PairingOptions, number: int) -> list[tuple[Scored, Scored]]:
    """The pairs of a prompt that the strategy takes, of those that may be taken.

    Args:
        pairs: the best chosen response first, and for each the best rejected one first.
        options: of the user.
        number: of the row.
    """
    if options.strategy == "all" or not pairs:
        return pairs
    of_the_best = [pair for pair in pairs if pair[0] is pairs[0][0]]
    if options.strategy == "best-worst":
        return [of_the_best[-1]]
    return [random.Random(f"{options.seed}/{number}").choice(of_the_best)]


def _merged(responses: list[Scored]) -> list[Scored]:
    """One response for each different text, with the mean of their scores; it is cut only if all of them are."""
    by_text: dict[str, list[Scored]] = {}
    for response in responses:
        by_text.setdefault(response.content, []).append(response)
    return [
        Scored(text, sum(one.score for one in same) / len(same), all(one.cut for one in same))
        for text, same in by_text.items()
    ]


def _read(row: dict[str, Any], where: str) -> list[Scored]:
    responses = row.get("responses")
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
        check_unicode(content, f"{where}: response {number}: `content`")
        found.append(Scored(content, float(score), fields.get("finish_reason") == "length"))
    return found


def _found(columns: dict[str, Any], name: str) -> str:
    return shown(columns[name]) if name in columns else "missing"
