"""Scored responses become pairs; ties and small gaps are left out and counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.data.pairing import PairingOptions, PairingReport, build_pairs, write_pairs
from simpo_megatron.data.schema import parse_preference
from simpo_megatron.errors import UserError

ROW = {
    "prompt": "p",
    "responses": [{"content": text, "score": score} for text, score in zip("abcd", (2, 5, 1, 2), strict=True)],
}


def pairs(
    rows: list[dict[str, Any]], strategy: Any = "best-worst", gap: float = 0.0, seed: int = 0, **more: Any
) -> tuple[list[tuple[str, str]], PairingReport, list[dict[str, Any]]]:
    report = PairingReport()
    options = PairingOptions(strategy=strategy, min_score_gap=gap, seed=seed, **more)
    built = list(build_pairs(((f"f:{i + 1}", row) for i, row in enumerate(rows)), report, options))
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
    rows = [{**ROW, "prompt": f"p{i}"} for i in range(40)]
    found = pairs(rows, "best-random", seed=1)[0]
    assert found == pairs(rows, "best-random", seed=1)[0] != pairs(rows, "best-random", seed=2)[0]
    assert {chosen for chosen, _ in found} == {"b"} and {rejected for _, rejected in found} == {"a", "c", "d"}


def test_what_gives_no_pair_is_counted() -> None:
    tied = {"prompt": "p", "responses": [{"content": "a", "score": 1}, {"content": "b", "score": 1}]}
    found, report, _ = pairs([tied, {"prompt": "p", "responses": tied["responses"][:1]}, tied])
    assert (found, report.no_gap, report.too_few, report.repeated, report.prompts) == ([], 1, 1, 1, 3)
    assert report.summary("out") == (
        "out: 0 pairs of 3 prompts; left out 1 prompts whose scores are equal or too close, "
        "1 with fewer than two different responses, 1 that repeat an earlier row"
    )


def answers(*responses: tuple[str, float, str]) -> dict[str, Any]:
    names = ("content", "score", "finish_reason")
    return {"prompt": "p", "responses": [dict(zip(names, response, strict=True)) for response in responses]}


def test_a_cut_response_is_not_chosen() -> None:
    row = answers(("long", 9, "length"), ("good", 5, "stop"), ("bad", 1, "stop"))
    assert pairs([row])[0] == [("good", "bad")]
    assert pairs([row], "all")[0] == [("good", "bad")]
    assert pairs([row], truncated_chosen=True)[0] == [("long", "bad")]
    found, report, _ = pairs([answers(("long", 9, "length"), ("bad", 1, "stop"))])
    assert (found, report.all_cut, report.no_gap) == ([], 1, 0)
    assert "1 without a whole response to choose" in report.summary("out")
    assert "--truncated-chosen" in str(report.nothing("source", 0.0))


def test_equal_responses_are_one_with_the_mean_of_their_scores() -> None:
    row = answers(("a", 1, "stop"), ("a", 5, "length"), ("b", 2, "stop"))
    found, report, built = pairs([row, answers(("a", 1, "stop"), ("a", 2, "stop"))])
    assert (found, report.merged, report.too_few) == ([("a", "b")], 2, 1)
    assert built[0]["score_chosen"] == 3


def test_a_margin_from_the_scores() -> None:
    (built,) = pairs([ROW], margin_scale=0.25)[2]
    assert built["margin"] == 1.0 and parse_preference(built, "").margin == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": 3}, "`prompt` is a number; it must be a text or a list of messages"),
        ({"prompt": None}, "`prompt` is missing; it must be"),
        ({"prompt": [{"role": "user\ud83d", "content": ""}]}, "`prompt` has half a surrogate pair"),
        ({"prompt": [{"role": "user"}]}, "`prompt` message 1: `content` is null; it must be"),
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
    with pytest.raises(UserError, match="Is a directory"):
        write_pairs([], tmp_path)
