"""Responses: the ids of training, draws that depend on the seed alone, resuming, shards, wrong input."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.schema import parse_preference
from simpo_megatron.on_policy.backends.transformers_backend import draw
from simpo_megatron.on_policy.prompts import Shard, read_prompts
from simpo_megatron.on_policy.sampling import SamplingSettings, response_seed
from tests.on_policy.generating import SAMPLING, TOKENS, rows_of, run
from tests.support.tiny import make_rows, make_tokenizer, write_rows

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The responses of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "responses.jsonl"
    assert run(prompts=prompts, hf_checkpoint=model, output=output, batch_size=100, **SAMPLING) == 0
    return rows_of(output)


def test_prompts_have_the_ids_of_training() -> None:
    encoder = PairEncoder(make_tokenizer(), DataOptions(), ())
    rows = make_rows(4)
    pairs = encoder.encode([parse_preference(row, "") for row in rows])
    assert encoder.encode_prompts([("", row["prompt"]) for row in rows]) == [pair.prompt for pair in pairs]
    assert all(pair.prompt.count(0) == 1 for pair in pairs), "one BOS"


def test_rows_keep_columns_seeds_and_reasons(whole: dict[str, dict[str, Any]]) -> None:
    assert whole.keys() == {f"p{i}" for i in range(7)}
    for name, row in whole.items():
        assert row["answer"] == int(name[1:]) and len(row["responses"]) == 3
        assert [response["seed"] for response in row["responses"]] == [response_seed(42, name, i) for i in range(3)]
        for response in row["responses"]:
            assert response["finish_reason"] in ("stop", "length") and 1 <= response["tokens"] <= TOKENS
            assert (response["finish_reason"] == "length") <= (response["tokens"] == TOKENS)
    assert len({response["content"] for row in whole.values() for response in row["responses"]}) > 15


def test_greedy_responses_are_those_of_transformers(model: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    greedy = {"num_responses": 1, "temperature": 0, "max_new_tokens": 8}
    assert run(prompts=prompts, hf_checkpoint=model, output=output, batch_size=3, **greedy) == 0
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for row in rows_of(output).values():
        inputs = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        plain = {"do_sample": False, "max_new_tokens": 8, "repetition_penalty": 1.0}
        new = reference.generate(**inputs, **plain)[0, inputs["input_ids"].shape[1] :]
        assert row["responses"][0]["content"] == tokenizer.decode(new, skip_special_tokens=True)


def test_draws_depend_neither_on_batch_nor_order_nor_shard(
    model: Path, prompts: Path, whole: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    found: dict[str, dict[str, Any]] = {}
    for part in (1, 2):
        output = tmp_path / f"{part}.jsonl"
        flags = {"prompts": turned, "hf_checkpoint": model, "output": output, "batch_size": 2, "shard": f"{part}/2"}
        assert run(**flags, **SAMPLING) == 0
        rows = rows_of(output)
        assert rows and not found.keys() & rows.keys()
        found |= rows
    assert found == whole


def test_a_killed_run_goes_on(
    model: Path, prompts: Path, whole: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "responses.jsonl"
    flags = {"prompts": prompts, "hf_checkpoint": model, "output": output, "batch_size": 3}
    assert run(**flags, **SAMPLING) == 0
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # as a kill in the middle of a write leaves it
    assert run(**flags, **SAMPLING) == 0
    assert rows_of(output) == whole and output.read_bytes().count(b"\n") == 7
    capsys.readouterr()
    assert run(**flags, **{**SAMPLING, "temperature": 0.5}) == 2
    assert "temperature is 1.0 there and 0.5 here" in capsys.readouterr().err
    other = write_rows(tmp_path / "other.jsonl", [{"id": "p0", "prompt": "another"}])
    assert run(**{**flags, "prompts": other}, **SAMPLING) == 2
    assert "has the prompt p" in capsys.readouterr().err
    output.write_text('{"id": "p0", "prompt": []}\n')
    assert run(**flags, **SAMPLING) == 2
    assert f"{output}:1: not a row with" in capsys.readouterr().err


@pytest.mark.parametrize("top_k", [0, 3])
def test_draws_follow_the_distribution(top_k: int) -> None:
    """Frequencies of many draws against the distribution that transformers' processors leave."""
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, -3.0], dtype=torch.float64)
    expected = logits / 0.7
    processors = [transformers.TopKLogitsWarper(top_k)] if top_k else []
    for processor in (*processors, transformers.TopPLogitsWarper(0.9)):
        ids: Any = torch.zeros(1, 1, dtype=torch.long)
        expected = processor(ids, expected[None])[0]
    count = 20000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = draw(logits.expand(count, -1), torch.full((count,), 0.7), SamplingSettings(top_p=0.9, top_k=top_k), numbers)
    frequencies = torch.bincount(found, minlength=5) / count
    torch.testing.assert_close(frequencies.double(), expected.softmax(0), atol=1e-3, rtol=0)
    greedy = draw(logits.expand(4, -1), torch.zeros(4), SamplingSettings(top_p=0.9, top_k=top_k), numbers[:4])
    assert greedy.tolist() == [3] * 4


def test_evaluation_prompts_are_kept_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "p.jsonl", [{"prompt": text} for text in ("One?", "Two?", "three", "Two?")])
    pairs = [{"prompt": "One?", "chosen": "a", "rejected": "b"}, {"instruction": "THREE!"}, {"turns": ["x", "y"]}]
    kept, report = read_prompts(str(source), [str(write_rows(tmp_path / "held.jsonl", pairs))])
    assert [prompt.messages[0]["content"] for prompt in kept] == ["Two?"]
    assert (report.rows, report.repeated, report.excluded, report.excluded_alike, report.kept) == (4, 1, 1, 1, 1)
    assert "1 that are evaluation prompts up to case" in report.summary("p.jsonl")
    parts = [read_prompts(str(source), (), Shard(number, 3))[0] for number in (1, 2, 3)]
    assert sorted(prompt.id for part in parts for prompt in part) == sorted(
        prompt.id for prompt in read_prompts(str(source))[0]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": "none.jsonl"}, "there is no such file"),
        ({"shard": "3/2"}, "--shard 3/2 is not a part"),
        ({"temperature": 0}, "--temperature 0"),
        ({"top_p": 0}, "--top-p 0"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size belongs to --backend vllm"),
        ({"backend": "vllm"}, "vllm is not installed"),
        ({"backend": "server"}, "--backend server needs --server-url"),
        ({"backend": "server", "server_url": "http://127.0.0.1:9/v1", "retries": 0}, "is it running?"),
        ({"backend": "server", "server_url": "localhost"}, "must begin with http"),
        ({"backend": "server", "server_url": "http://[::1"}, "is not an address"),
        ({"backend": "server", "server_url": "http://127.0.0.1:port/v1"}, "is not an address (nonnumeric port"),
        ({"output": "responses.json"}, "ends in .jsonl"),
        ({"questions": "x"}, "--questions belongs to --for"),
        ({"for": "alpaca_eval", "questions": "x"}, "--for takes --questions alone"),
        ({"hf_checkpoint": "none"}, "is not a folder"),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, Any],
    words: str,
    model: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(**{"prompts": prompts, "hf_checkpoint": model, "output": "r.jsonl", **SAMPLING, **change}) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not Path("r.jsonl").exists()


def test_wrong_prompts_are_named(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for rows, words in (
        ([{"prompt": ""}], ":1: `prompt` is empty"),
        ([{"text": "a"}], ":1: `prompt` is missing"),
        ([{"prompt": said}], ":1: `prompt` ends with an assistant's message"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], ":2: `id` 1 is that of another prompt"),
        ([{"id": [], "prompt": "a"}], ":1: `id` is []"),
        ([{"id": "a\nb", "prompt": "a"}, {"id": "a\nb", "prompt": "b"}], ":2: `id` a b is that of another prompt"),
    ):
        source = write_rows(tmp_path / "p.jsonl", rows)
        assert run(prompts=source, hf_checkpoint=model, output=tmp_path / "r.jsonl") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    for column, words in ((r'"\ud83d"', "the row has half a surrogate pair"), ("1", ":2: not valid JSON")):
        source.write_text('{"prompt": "a", "other": ' + column + '}\n{"prompt')
        assert run(prompts=source, hf_checkpoint=model, output=tmp_path / "r.jsonl") == 2
        assert words in capsys.readouterr().err
    source = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    flags = {"prompts": source, "hf_checkpoint": model, "output": tmp_path / "r.jsonl", "exclude_prompts": [source]}
    assert run(**flags) == 2
    assert "no prompt is left to answer" in capsys.readouterr().err


def test_a_token_that_the_model_does_not_know_and_logits_that_are_no_numbers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, source = tmp_path / "model", write_rows(tmp_path / "p.jsonl", [{"prompt": "amber"}, {"prompt": "zebra"}])
    shutil.copytree(model, folder)
    flags = {"prompts": source, "hf_checkpoint": folder, "output": tmp_path / "r.jsonl", **SAMPLING}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    assert run(**flags) == 2
    said = f"{source}:2: the tokenizer of --hf-checkpoint gives the token {len(tokenizer) - 1}"
    assert said in capsys.readouterr().err
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][5, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    assert run(**flags) == 2
    assert "the model's logits are NaN or infinite" in capsys.readouterr().err


def test_responses_longer_than_the_model_takes_are_refused(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the number that the error gives works, into the same file, since it has no row yet."""
    flags = {"prompts": prompts, "hf_checkpoint": model, "output": tmp_path / "r.jsonl"}
    assert run(**flags, **{**SAMPLING, "max_new_tokens": 500}) == 2
    most = re.search(r"use at most --max-new-tokens (\d+)$", capsys.readouterr().err.strip())
    assert most is not None and 50 < int(most[1]) < 128
    assert run(**flags, num_responses=1, temperature=0, max_new_tokens=int(most[1]) + 1) == 2
    assert run(**flags, num_responses=1, temperature=0, max_new_tokens=int(most[1])) == 0


def scored(row: dict[str, Any]) -> dict[str, Any]:
    """What `rewards.short` makes of a row."""
    return {**row, "responses": [{**one, "score": -float(len(one["content"]))} for one in row["responses"]]}


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_kill_at_any_block(
    stage: str, model: Path, prompts: Path, whole: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """A process that kills itself (signal 9) after its third block, until the work is done."""
    responses = write_rows(tmp_path / "in.jsonl", list(whole.values()))
    output = tmp_path / "out.jsonl"
    program = {
        "generate": ["tools/generate_responses.py", "--prompts", prompts, "--hf-checkpoint", model, "--batch-size", 3]
        + [word for name, value in SAMPLING.items() for word in ("--" + name.replace("_", "-"), value)],
        "score": ["tools/score_responses.py", "--responses", responses, "--scorer", "tests.on_policy.rewards:short"],
    }[stage]
    argv = [*map(str, program), "--output", str(output)]
    code = (
        "import os, runpy, signal, sys\n"
        "from simpo_megatron.on_policy import journal\n"
        "from simpo_megatron.on_policy.scorers.function import FunctionScorer\n"
        "FunctionScorer.block = 1\n"
        "append, calls = journal.Journal.append, []\n"
        "def appending(self, rows):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 4:\n"
        "        with self.path.open('ab') as file:\n"
        '            file.write(b\'{"id": "p\')\n'
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    append(self, rows)\n"
        "journal.Journal.append = appending\n"
        f"sys.argv = {argv!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    codes = []
    while 0 not in codes and len(codes) < 6:
        codes.append(subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, check=False).returncode)
    assert codes == [-signal.SIGKILL] * 2 + [0]
    found = rows_of(output)
    assert output.read_bytes().count(b"\n") == len(found) == 7, "no prompt twice"
    expected = whole if stage == "generate" else {name: scored(row) for name, row in whole.items()}
    assert found == expected, "as without a kill"
