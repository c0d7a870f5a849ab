"""The quick start's data are right, and its report measures what it says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from simpo_megatron.data.schema import parse_preference
from simpo_megatron.errors import UserError
from tests.support.tiny import make_rows, write_rows

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> ModuleType:
    """An example script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data = load_example("quickstart_data")
report = load_example("quickstart_report")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up quick start before its first training."""
    folder = tmp_path_factory.mktemp("quickstart")
    data.prepare(folder, None, seed=0)
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def items(row: dict) -> frozenset[str]:
    """The two things a made-up question is about."""
    return frozenset(row["prompt"][0]["content"].rstrip("?").split(", ")[1].split(" or "))


def test_made_up_answers_are_right_and_wrong() -> None:
    train, held_out = data.made_up_rows(seed=3)
    for row in [*train, *held_out]:
        chosen, rejected = parse_preference(row, "row").texts
        one, other = items(row)
        question = row["prompt"][0]["content"]
        right = (min if "smaller" in question or "first" in question else max)(one, other)
        wrong = other if right == one else one
        assert chosen.endswith(f" {right}.") and rejected.endswith(f" {wrong}.") and row["answer"] == right


def test_made_up_rows_follow_the_seed_and_hold_out_whole_questions() -> None:
    train, held_out = data.made_up_rows(seed=0)
    assert (train, held_out) == data.made_up_rows(seed=0) != data.made_up_rows(seed=1)
    assert not {items(row) for row in train} & {items(row) for row in held_out}
    swapped = [one != other for one, other in zip(data.demonstrations(train, 0), train, strict=True)]
    assert sum(swapped) / len(train) == pytest.approx(data.WRONG_DEMONSTRATIONS, abs=0.03)


def test_own_rows_are_split_by_prompt(tmp_path: Path) -> None:
    rows = make_rows(40)
    path = write_rows(tmp_path / "own.jsonl", [*rows, rows[0], {**rows[1], "rejected": rows[1]["chosen"]}])
    train, held_out = data.split(data.own_rows(path))
    assert len(train) + len(held_out) == 41
    assert not {json.dumps(row["prompt"]) for row in train} & {json.dumps(row["prompt"]) for row in held_out}
    assert (train, held_out) == data.split(data.own_rows(path))
    with pytest.raises(UserError, match="at least two different prompts"):
        data.split([rows[0]])


def test_report_equals_one_sequence_at_a_time(output: Path) -> None:
    checkpoint = report.Checkpoint(output / "model", max_length=64)
    rows = read(output / "data" / "heldout.jsonl")[:5]
    sequences = [response for row in rows for response in checkpoint.responses(row)]
    batched = checkpoint.average_logprobs(sequences)
    for (prompt, answer), value in zip(sequences, batched, strict=True):
        with torch.no_grad():
            logits = checkpoint.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        alone = [logits[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
        assert torch.stack(alone).mean().item() == pytest.approx(value.item(), rel=1e-5)
    long = {**rows[0], "prompt": [{"role": "user", "content": "Which number? " * 80}]}
    assert [len(prompt) for prompt, _ in checkpoint.responses(long)] == [32, 32]


def test_report_prints_a_table_and_draws(output: Path, tmp_path: Path) -> None:
    metrics = [
        {"step": step, f"{prefix}{name}": 0.5}
        for step in (1, 2)
        for prefix in ("", "eval/")
        for name in ("loss", "rewards/margins", "rewards/accuracies")
    ]
    command = [sys.executable, str(EXAMPLES / "quickstart_report.py"), "--before", output / "model"]
    command += ["--after", output / "model", "--held-out", output / "data" / "heldout.jsonl"]
    command += ["--metrics", write_rows(tmp_path / "metrics.jsonl", metrics), "--plot", tmp_path / "curves.png"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "ranking accuracy" in line)
    before, after = line.split("│")[2:4]
    assert float(before) == float(after)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dta", "x"], "--dta is not a flag"),
        (["--data"], "--data needs a value"),
        (["--data", "/no/such.jsonl"], "there is no such file"),
        (["--output", str(EXAMPLES)], "is not of an earlier quick start"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(arguments: list[str], sentence: str) -> None:
    done = subprocess.run(["bash", str(EXAMPLES / "quickstart.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1
