"""The length report before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny import write_rows
from tools import response_lengths


def responses(*lengths: int, tokens: bool = True) -> list[dict[str, object]]:
    """Texts of so many characters, half as many tokens; those of 8 are cut."""
    return [
        {"content": "x" * n, "finish_reason": "length" if n == 8 else "stop", **({"tokens": n // 2} if tokens else {})}
        for n in lengths
    ]


def test_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_rows(tmp_path / "before.jsonl", [{"prompt": "a", "responses": responses(2, 4)}])
    rows = [{"prompt": "a", "responses": responses(8, 8)}, {"prompt": "b", "responses": responses(4, 4)}]
    after, report = write_rows(tmp_path / "after.jsonl", rows), tmp_path / "report.json"
    assert response_lengths.main([str(before), str(after), "--json", str(report)]) == 0
    said = capsys.readouterr().out
    assert "+50.0%" in said and "+1.5" in said and "different prompts" in said
    found = json.loads(report.read_text())
    names = ("prompts", "responses", "tokens", "characters", "truncated")
    assert [[row[name] for name in names] for row in found["files"]] == [[1, 2, 1.5, 3.0, 0.0], [2, 4, 3.0, 6.0, 0.5]]
    assert found["change"] == dict(zip(names, [1, 2, 1.5, 3.0, 0.5], strict=True))


def test_counts_of_tokens_may_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = responses(2) + responses(4, tokens=False)
    file = write_rows(tmp_path / "by_hand.jsonl", [{"prompt": "a", "responses": mixed}])
    assert response_lengths.main([str(file), str(file)]) == 0
    said = capsys.readouterr().out
    assert "not known" in said and "different prompts" not in said
    assert response_lengths.main([str(file), "--json", str(file)]) == 2
    assert "would write over" in capsys.readouterr().err
