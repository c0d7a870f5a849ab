"""The files of benchmarks: fields, order, turns; AlpacaEval's own loader reads ours."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from simpo_megatron.on_policy.arena_style import style
from tests.support.tiny import make_checkpoint, write_rows
from tools import generate_responses

TOKENS = 5
ALPACA_EVAL = Path(__file__).resolve().parents[2] / ".venv" / "alpaca_eval"  # put there by tools/venv.sh with-te


def alpaca_eval_loader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """AlpacaEval's own module that reads files of outputs, without the packages of its judges."""
    if not ALPACA_EVAL.is_dir():
        pytest.skip("AlpacaEval's wheel is not there; . tools/venv.sh with-te installs it")
    package = ModuleType("alpaca_eval")
    package.__path__ = [str(ALPACA_EVAL / "alpaca_eval")]
    monkeypatch.setitem(sys.modules, "alpaca_eval", package)
    monkeypatch.setitem(sys.modules, "pkg_resources", ModuleType("pkg_resources"))  # it asks for versions of judges
    return importlib.import_module("alpaca_eval.utils")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


def answer(benchmark: str, questions: Path, output: Path, model: Path, *more: str) -> int:
    flags = ["--for", benchmark, "--questions", str(questions), "--output", str(output), "--hf-checkpoint", str(model)]
    return generate_responses.main([*flags, "--max-new-tokens", str(TOKENS), *more])


def test_alpaca_eval(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [
        {"instruction": text, "dataset": "helpful_base", "output": "x", "generator": "y"}
        for text in ("amber birch amber birch cedar", "amber", "kelp kelp kelp")
    ]
    source, output = tmp_path / "alpaca_eval.json", tmp_path / "outputs.json"
    source.write_text(json.dumps(questions))
    assert answer("alpaca_eval", source, output, model) == 0
    said = capsys.readouterr().out
    assert f"Next: alpaca_eval --model_outputs {output}" in said and "cut at --max-new-tokens" in said
    found = json.loads(output.read_text())
    assert [row["instruction"] for row in found] == [row["instruction"] for row in questions], "in the set's order"
    assert all(row.keys() == {"dataset", "instruction", "output", "generator"} for row in found)
    assert {row["generator"] for row in found} == {"tiny"}
    about = json.loads((tmp_path / "outputs.json.responses.about.json").read_text())
    assert (about["temperature"], about["top_p"], about["num_responses"]) == ([0.9], 1.0, 1)
    loader = alpaca_eval_loader(monkeypatch)
    frame = loader.load_or_convert_to_dataframe(output)
    assert loader.get_generator_name(None, frame) == "tiny"
    assert list(frame["output"]) == [row["output"] for row in found] and list(frame["instruction"]) == [
        row["instruction"] for row in questions
    ]


def test_arena_hard(model: Path, tmp_path: Path) -> None:
    new = write_rows(tmp_path / "q.jsonl", [{"uid": "u1", "category": "c", "prompt": "amber"}])
    assert answer("arena_hard", new, tmp_path / "mine.jsonl", model) == 0
    (row,) = map(json.loads, (tmp_path / "mine.jsonl").read_text().splitlines())
    assert row.keys() == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
    assert (row["uid"], row["model"], row["messages"][0]) == ("u1", "mine", {"role": "user", "content": "amber"})
    assert isinstance(row["messages"][1]["content"]["answer"], str)
    old = write_rows(tmp_path / "q.jsonl", [{"question_id": "u1", "category": "c", "turns": [{"content": "amber"}]}])
    assert answer("arena_hard_v0.1", old, tmp_path / "old.jsonl", model) == 0
    (row,) = map(json.loads, (tmp_path / "old.jsonl").read_text().splitlines())
    assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"}
    assert isinstance(row["choices"][0]["turns"][0]["content"], str)


def test_mt_bench_has_two_turns(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [
        {"question_id": number, "category": category, "turns": [f"amber {number}", "cedar"]}
        for number, category in ((81, "writing"), (82, "math"), (83, "stem"))
    ]
    source, output = write_rows(tmp_path / "question.jsonl", questions), tmp_path / "mine.jsonl"
    assert answer("mt_bench", source, output, model) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["question_id"] for row in found] == [81, 82, 83] and {row["model_id"] for row in found} == {"mine"}
    assert all(len(row["choices"][0]["turns"]) == 2 for row in found)
    rows = {row["id"]: row for row in map(json.loads, Path(f"{output}.responses.jsonl").read_text().splitlines())}
    first = rows["82"]["responses"][0]["content"]
    assert rows["82#2"]["prompt"][1] == {"role": "assistant", "content": first}, "conditioned on the first answer"
    about = json.loads((tmp_path / "mine.jsonl.responses.about.json").read_text())
    assert about["temperature"] == [0.0, 0.1, 0.7]
    capsys.readouterr()
    assert answer("mt_bench", source, tmp_path / "other.jsonl", model, "--temperature", "0") == 0
    assert "--model-list other" in capsys.readouterr().out


def test_a_question_that_has_changed_is_not_answered_by_the_old_answer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text has a line separator of Unicode, which ends no line of JSON."""
    asked, output = {"question_id": 1, "category": "math", "turns": ["am\u2028ber", "kelp"]}, tmp_path / "o.jsonl"
    source = tmp_path / "q.jsonl"
    source.write_text(json.dumps(asked, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [answer("mt_bench", source, output, model) for _ in range(2)] == [0, 0]
    capsys.readouterr()
    for turns, changed in ((["cedar", "kelp"], "1"), (["am\u2028ber", "cedar"], "1#2")):
        write_rows(source, [{**asked, "turns": turns}])
        assert answer("mt_bench", source, output, model) == 2
        assert f"has the prompt {changed}, which has another prompt in {source}" in capsys.readouterr().err


def test_style_counts_without_code() -> None:
    text = "# A\n## B\n**bold** __too__\n- one\n2. two\n```\n# not a header\n- nor a list\n```\n"
    counts: dict[str, Any] = style(text, "gpt-4o")
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 1, "unordered": 1} and counts["bold_count"] == {"**": 1, "__": 1}


def test_wrong_questions_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for benchmark, rows, words in (
        ("alpaca_eval", [{"prompt": "a"}], "not a question of alpaca_eval ('instruction')"),
        ("arena_hard", [{"question_id": 1, "turns": []}], "not a question of arena_hard ('uid')"),
        ("mt_bench", [{"question_id": 1, "category": "x", "turns": ["a"]}], "q.jsonl:1"),
        ("alpaca_eval", [{"instruction": "a"}, {"instruction": "a"}], "1 questions that repeat an earlier one"),
        ("alpaca_eval", [{"instruction": "a", "dataset": "\ud83d"}], "q.jsonl:1: the row has half a surrogate pair"),
    ):
        source = write_rows(tmp_path / "q.jsonl", rows)
        assert answer(benchmark, source, tmp_path / "o.json", model) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert answer("alpaca_eval", tmp_path / "none", tmp_path / "o.json", model) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "deep").write_text("[" * 10**5)
    assert answer("alpaca_eval", tmp_path / "deep", tmp_path / "o.json", model) == 2
    assert "cannot be read" in capsys.readouterr().err
    good = write_rows(tmp_path / "q.jsonl", [{"instruction": "a"}])
    before = good.read_text()
    assert answer("alpaca_eval", good, good, model) == 2
    assert "would write over" in capsys.readouterr().err and good.read_text() == before
    assert answer("alpaca_eval", good, tmp_path / "o.json", model, "--num-responses", "2") == 2
    assert "a benchmark reads one response" in capsys.readouterr().err
