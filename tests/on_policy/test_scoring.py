"""Scores: a reward model against transformers, functions, a judge in both orders, resuming, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

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


# What people score with: Llama with the end of a turn or nothing as padding, Qwen2 with another token, Gemma-2 with
# sliding windows and soft-capped attention.
REWARD_MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"pad_token_id": 1},
    "Llama without padding": {"pad_token_id": None},
    "Qwen2": {"pad_token_id": 5},
    "Gemma2": {"pad_token_id": 3, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0},
}


def make_reward_model(folder: Path, kind: str) -> Path:
    """A random model with one output, whose template and tokenizer both write a BOS, and whose tokenizer pads left."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    writes_bos = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.backend_tokenizer.post_processor = writes_bos  # type: ignore[assignment]
    assert tokenizer("amber")["input_ids"][0] == 0
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    architecture = kind.split()[0]
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        initializer_range=0.2,
        **REWARD_MODELS[kind],
    )
    getattr(transformers, f"{architecture}ForSequenceClassification")(config).save_pretrained(folder)
    return folder


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "responses.jsonl", ROWS)


def words(**flags: Any) -> list[str]:
    return [str(word) for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]


def run(**flags: Any) -> int:
    return score_responses.main(words(**flags))


def scores(path: Path) -> dict[str, list[float]]:
    rows = map(json.loads, path.read_text().splitlines())
    return {row["id"]: [response["score"] for response in row["responses"]] for row in rows}


@pytest.mark.parametrize("kind", REWARD_MODELS)
def test_batches_have_the_scores_of_single_conversations(kind: str, responses: Path, tmp_path: Path) -> None:
    """Of mixed lengths, against transformers without padding, on attention written out."""
    folder, output = make_reward_model(tmp_path / "rm", kind), tmp_path / "scored.jsonl"
    assert run(responses=responses, reward_model=folder, output=output, batch_tokens=70) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found, expected = [], []
    for row in ROWS:
        found += scores(output)[row["id"]]
        for response in row["responses"]:
            messages = [*row["prompt"], {"role": "assistant", "content": response["content"]}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            assert int((ids == 0).sum()) == 1
            with torch.no_grad():
                expected.append(model(ids).logits[0, 0].item())
    assert found == pytest.approx(expected, abs=1e-5, rel=0) and max(expected) - min(expected) > 0.1


def test_code_of_the_folder_runs_only_when_it_is_allowed(
    responses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of ArmoRM: many outputs, and one number of its own in `.score`; without that, many outputs are refused."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = make_reward_model(tmp_path / "rm", "Llama")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoModelForSequenceClassification": "own_code.Own"}
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "auto_map": own}
    (folder / "config.json").write_text(json.dumps({**config, **labels}))
    code = (
        "import types\n"
        "from transformers import LlamaForSequenceClassification\n"
        "class Own(LlamaForSequenceClassification):\n"
        "    def __init__(self, config):\n"
        "        config.num_labels = 1\n"
        "        super().__init__(config)\n"
        "        config.num_labels = 2\n"
        "    def forward(self, **inputs):\n"
        "        one = super().forward(**inputs).logits\n"
        "        return types.SimpleNamespace(logits=one.repeat(1, 2), score=SCORE)\n"
    )
    flags = {"responses": responses, "reward_model": folder, "output": tmp_path / "scored.jsonl"}
    assert run(**flags) == 2
    assert "computed by code in its folder (own_code.Own)" in capsys.readouterr().err
    for score, wanted in (("None", 2), ("-one[:, 0]", 0)):
        (folder / "own_code.py").write_text(code.replace("SCORE", score))
        assert score_responses.main([*words(**flags), "--trust-remote-code"]) == wanted
    assert "has 2 outputs" in capsys.readouterr().err
    plain = make_reward_model(tmp_path / "plain", "Llama")
    assert run(responses=responses, reward_model=plain, output=tmp_path / "plain.jsonl") == 0
    negated = {name: [-score for score in found] for name, found in scores(tmp_path / "plain.jsonl").items()}
    assert scores(tmp_path / "scored.jsonl") == negated


def test_a_token_that_the_reward_model_does_not_know(
    responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_reward_model(tmp_path / "rm", "Llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["birch birch"])
    tokenizer.save_pretrained(folder)
    assert run(responses=responses, reward_model=folder, output=tmp_path / "s.jsonl") == 2
    said = f"{responses}:1: the tokenizer of --reward-model {folder} gives the token {len(tokenizer) - 1}"
    assert said in capsys.readouterr().err


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
    assert "has another prompt" in capsys.readouterr().err
    again = write_rows(tmp_path / "again.jsonl", [*ROWS[1:], {**ROWS[0], "responses": [{"content": "drawn again"}]}])
    assert run(**{**flags, "responses": again}) == 2
    assert "the prompt p0, which has another prompt or other responses in" in capsys.readouterr().err


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
        ({"scorer": "tests.on_policy.rewards:leaving"}, "raised SystemExit: 3; correct the function"),
        ({"scorer": "leaves:score"}, "--scorer leaves:score cannot be imported (SystemExit: 4)"),
        ({"scorer": "tests.on_policy.rewards:too_few"}, "returned 1 scores for 3 responses"),
        ({"scorer": "tests.on_policy.rewards:not_finite"}, "returned nan"),
        ({"scorer": "tests.on_policy.rewards:text"}, "returned '1'"),
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
    (tmp_path / "leaves.py").write_text("raise SystemExit(4)")
    flags = {"responses": responses, "scorer": "tests.on_policy.rewards:short", "output": "scored.jsonl", **change}
    assert run(**{name: value for name, value in flags.items() if value is not None}) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_sigterm_in_a_function_ends_the_program(responses: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="143"):
        run(responses=responses, scorer="tests.on_policy.rewards:terminated", output=tmp_path / "s.jsonl")


def test_wrong_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rows, words in (
        ([{"prompt": "a"}], ":1: `responses` is null"),
        ([{"prompt": "a", "responses": [{"text": "b"}]}], ":1: response 1 is"),
        ([ROWS[0], ROWS[0]], ":2: `id` p0 is that of"),
    ):
        source = write_rows(tmp_path / "r.jsonl", rows)
        assert run(responses=source, scorer="tests.on_policy.rewards:short", output=tmp_path / "s.jsonl") == 2
        assert words in capsys.readouterr().err and not (tmp_path / "s.jsonl").read_text(), "before the first score"
