"""Scored responses become pairs; ties and small gaps are left out and counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.data.pairing import PairingReport, Strategy, build_pairs, write_pairs
from simpo_megatron.data.schema import parse_preference
from simpo_megatron.errors import UserError

ROW = {
    "prompt": "p",
    "responses": [{"content": text, "score": score} for text, score in zip("abcd", (2, 5, 1, 2), strict=True)],
}


def pairs(
    rows: list[dict[str, Any]], strategy: Strategy = "best-worst", gap: float = 0.0, seed: int = 0
) -> tuple[list[tuple[str, str]], PairingReport, list[dict[str, Any]]]:
    report = PairingReport()
    built = list(build_pairs(((f"f:{i + 1}", row) for i, row in enumerate(rows)), report, strategy, gap, seed))
    return [(pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]) for pair in built], report, built


def test_best_and_worst() -> None:
    found, report, built = pairs([ROW])
    assert found == [("b", "c")]
    assert (report.prompts, report.pairs, report.no_gap, report.too_few) == (1, 1, 0, 0)
    preference = parse_preference(built[0], "")
    assert preference.scores == (5, 1) and preference.prompt == [{"role": "user", "content": "p"}]


def test_all_pairs_above_a_gap() -> None:
    assert pairs([ROW], "all")[0] == [("b", "a"), ("b", "d"), ("b", "c"), ("a", "c"), ("d", "c")]
    assert pairs([ROW], "all", 3)[0] == [("b", "a"), ("b", "d"), ("b", "c")]
    found, report, _ = pairs([ROW], "all", 9)
    assert (found, report.no_gap) == ([], 1)


def test_best_and_random_is_a_function_of_seed_and_row() -> None:
    rows = [ROW] * 40
    found = pairs(rows, "best-random", seed=1)[0]
    assert found == pairs(rows, "best-random", seed=1)[0] != pairs(rows, "best-random", seed=2)[0]
    assert {chosen for chosen, _ in found} == {"b"} and {rejected for _, rejected in found} == {"a", "c", "d"}


def test_what_gives_no_pair_is_counted() -> None:
    tied = {"prompt": "p", "responses": [{"content": "a", "score": 1}, {"content": "b", "score": 1}]}
    found, report, _ = pairs([tied, {"prompt": "p", "responses": tied["responses"][:1]}])
    assert (found, report.no_gap, report.too_few, report.prompts) == ([], 1, 1, 2)
    assert report.summary("out") == (
        "out: 0 pairs of 2 prompts; left out 1 prompts without the score gap, 1 with fewer than two responses"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": 3}, "`prompt` is 3; it must be a text or a list of messages"),
        ({"prompt": None}, "`prompt` is null; it must be"),
        ({"prompt": [{"role": "user"}]}, "`prompt` is [{'role': 'user'}]; it must be"),
        ({"responses": "a"}, "`responses` is 'a'; it must be a list of {content, score}"),
        ({"responses": None}, "`responses` is null"),
        ({"responses": ["a"]}, "response 1: `content` is missing; give a text"),
        ({"responses": [{"content": None, "score": 1}]}, "response 1: `content` is null; give a text, or remove the"),
        (
            {"responses": [{"content": "a", "score": 1}, {"content": "b", "score": "2"}]},
            "response 2: `score` is '2'; give a finite number of at most 3e38, or remove the response",
        ),
        ({"responses": [{"content": "a", "score": None}]}, "`score` is null; give"),
        ({"responses": [{"content": "a", "score": float("nan")}]}, "`score` is nan; give"),
        ({"responses": [{"content": "a", "score": 10**400}]}, "000; give a finite number"),
    ],
)
def test_a_wrong_row_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        pairs([ROW, {**ROW, **change}])
    message = str(caught.value)
    assert message.startswith("f:2: ") and words in message and len(message) < 200


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_pairs([{"prompt": "ü"}], path)
    assert path.read_text(encoding="utf-8") == '{"prompt": "ü"}\n'

    def broken() -> Iterator[dict[str, Any]]:
        yield {"prompt": "new"}
        raise UserError("no")

    with pytest.raises(UserError):
        write_pairs(broken(), path)
    assert path.read_text(encoding="utf-8") == '{"prompt": "ü"}\n'
    assert list(tmp_path.iterdir()) == [path]
