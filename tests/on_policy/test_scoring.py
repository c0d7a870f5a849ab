"""Scores: a reward model against transformers, functions, a judge in both orders, resuming, wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from simpo_megatron.on_policy.scorers.judge import read_verdict
from tests.support.openai_server import serving
from tests.support.tiny import make_checkpoint, make_tokenizer, write_rows
from tools import build_pairs, score_responses

ROWS = [
    {
        "id": f"p{i}",
        "prompt": [{"role": "user", "content": f"amber {i}"}],
        "responses": [{"content": "birch " * (i + j + 1), "finish_reason": "stop", "tokens": 3} for j in range(3)],
        "answer": str(i),
    }
    for i in range(5)
]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with one output, whose template and tokenizer both write a BOS."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        num_labels=1,
        initializer_range=0.2,
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "responses.jsonl", ROWS)


def run(**flags: Any) -> int:
    return score_responses.main([str(w) for name, v in flags.items() for w in ("--" + name.replace("_", "-"), v)])


def scores(path: Path) -> dict[str, list[float]]:
    rows = map(json.loads, path.read_text().splitlines())
    return {row["id"]: [response["score"] for response in row["responses"]] for row in rows}


def test_a_reward_model(reward_model: Path, responses: Path, tmp_path: Path) -> None:
    """Batches of padded rows give the scores of one conversation at a time."""
    output = tmp_path / "scored.jsonl"
    assert run(responses=responses, reward_model=reward_model, output=output, batch_tokens=70) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    for row in ROWS:
        for response, found in zip(row["responses"], scores(output)[row["id"]], strict=True):
            messages = [*row["prompt"], {"role": "assistant", "content": response["content"]}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            assert int((ids == 0).sum()) == 1
            with torch.no_grad():
                assert found == pytest.approx(model(ids).logits[0, 0].item(), abs=1e-5)


def test_a_reward_model_without_a_padding_token(reward_model: Path, responses: Path, tmp_path: Path) -> None:
    """The token that ends a conversation must not be taken for padding: the score is read at the last token."""
    folder = tmp_path / "unpadded"
    shutil.copytree(reward_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    output = tmp_path / "scored.jsonl"
    assert run(responses=responses, reward_model=folder, output=output) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in ROWS:
        for response, found in zip(row["responses"], scores(output)[row["id"]], strict=True):
            messages = [*row["prompt"], {"role": "assistant", "content": response["content"]}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.no_grad():
                assert found == pytest.approx(model(ids).logits[0, 0].item(), abs=1e-5)


def test_a_checkpoint_without_a_head_is_refused(
    responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint(tmp_path / "lm", num_hidden_layers=1)
    assert run(responses=responses, reward_model=folder, output=tmp_path / "s.jsonl") == 2
    assert "has no weights for score.weight" in capsys.readouterr().err


def test_a_function_and_resuming(responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scored.jsonl"
    flags = {"responses": responses, "scorer": "tests.on_policy.rewards:short", "output": output}
    assert run(**flags) == 0
    expected = {row["id"]: [-float(len(one["content"])) for one in row["responses"]] for row in ROWS}
    assert scores(output) == expected
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["answer"] for row in rows] == [row["answer"] for row in ROWS], "columns are kept"
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    assert run(**flags) == 0
    assert scores(output) == expected and output.read_bytes().count(b"\n") == 5
    capsys.readouterr()
    other = write_rows(tmp_path / "other.jsonl", [{**ROWS[0], "prompt": "another"}])
    assert run(**{**flags, "responses": other}) == 2
    assert "is another prompt in" in capsys.readouterr().err


def test_a_judge_is_asked_in_both_orders(responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge that likes short answers gives a ranking; one that likes the first place gives ties."""
    likes_first = False

    def reply(path: str, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][0]["content"]
        first, second = (text.split(f"[Answer {name}]\n")[1].split("\n\n[")[0] for name in "AB")
        verdict = "A" if likes_first or len(first) < len(second) else "B"
        return {"choices": [{"message": {"content": f"I think [[C]]? No: [[{verdict}]]"}}]}

    with serving(reply) as url:
        output = tmp_path / "scored.jsonl"
        assert run(responses=responses, judge_url=url, output=output) == 0
        assert set(map(tuple, scores(output).values())) == {(1.0, 0.5, 0.0)}
        pairs = ["--data", output, "--output", tmp_path / "pairs.jsonl", "--judge-url", url, "--verify-pairs", "drop"]
        assert build_pairs.main(list(map(str, pairs))) == 0
        assert "5 pairs of 5 prompts" in capsys.readouterr().out
        likes_first = True
        assert run(responses=responses, judge_url=url, output=tmp_path / "ties.jsonl") == 0
        assert set(map(tuple, scores(tmp_path / "ties.jsonl").values())) == {(0.5, 0.5, 0.5)}
        assert build_pairs.main(list(map(str, pairs))) == 2
        assert "5 pairs that the judge could not decide" in capsys.readouterr().err


def test_the_judge_turns_pairs_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores prefer long answers, the judge short ones."""
    scored = [{**row, "responses": [{**one, "score": len(one["content"])} for one in row["responses"]]} for row in ROWS]
    source, output = write_rows(tmp_path / "scored.jsonl", scored), tmp_path / "pairs.jsonl"

    def reply(path: str, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][0]["content"]
        first, second = (text.split(f"[Answer {name}]\n")[1].split("\n\n[")[0] for name in "AB")
        return {"choices": [{"message": {"content": f"[[{'A' if len(first) < len(second) else 'B'}]]"}}]}

    with serving(reply) as url:
        flags = ["--data", source, "--output", output, "--judge-url", url, "--verify-pairs"]
        assert build_pairs.main([*map(str, flags), "flip"]) == 0
        assert "turned 5 pairs round" in capsys.readouterr().out
        for line in output.read_text().splitlines():
            row = json.loads(line)
            assert len(row["chosen"][-1]["content"]) < len(row["rejected"][-1]["content"])
            assert row.keys() == {"prompt", "chosen", "rejected"}
        assert build_pairs.main([*map(str, flags), "drop"]) == 2
        assert "5 pairs of which it prefers the rejected response" in capsys.readouterr().err


def test_verdicts() -> None:
    def read(text: str) -> float:
        return read_verdict({"choices": [{"message": {"content": text}}]})

    assert [read(f"... [[{letter}]]") for letter in "ABC"] == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="no verdict"):
        read("A is better")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scorer": None}, "0 scorers are given; give one of --reward-model, --scorer, --judge-url"),
        ({"reward_model": "x"}, "2 scorers are given"),
        ({"scorer": "rewards"}, "is not module:function"),
        ({"scorer": "none_such:f"}, "cannot be imported"),
        ({"scorer": "tests.on_policy.rewards:NUMBER"}, "is int, not a function"),
        ({"scorer": "tests.on_policy.rewards:broken"}, "RuntimeError: no reward"),
        ({"scorer": "tests.on_policy.rewards:too_few"}, "returned 1 scores for 3 responses"),
        ({"scorer": "tests.on_policy.rewards:not_finite"}, "returned nan"),
        ({"judge_model": "x"}, "--judge-model has no effect with --scorer"),
        ({"responses": "none.jsonl"}, "there is no such file"),
        ({"output": "responses.jsonl", "responses": "responses.jsonl"}, "is the input"),
        ({"scorer": None, "reward_model": "none"}, "--reward-model none is not a folder"),
        ({"scorer": None, "judge_url": "http://127.0.0.1:9/v1", "judge_retries": 0}, "is it running?"),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, Any],
    words: str,
    responses: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"responses": responses, "scorer": "tests.on_policy.rewards:short", "output": "scored.jsonl", **change}
    assert run(**{name: value for name, value in flags.items() if value is not None}) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_wrong_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rows, words in (
        ([{"prompt": "a"}], ":1: `responses` is null"),
        ([{"prompt": "a", "responses": [{"text": "b"}]}], ":1: response 1 is"),
        ([ROWS[0], ROWS[0]], ":2: `id` p0 is that of"),
    ):
        source = write_rows(tmp_path / "r.jsonl", rows)
        assert run(responses=source, scorer="tests.on_policy.rewards:short", output=tmp_path / "s.jsonl") == 2
        assert words in capsys.readouterr().err
