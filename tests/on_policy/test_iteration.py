"""A loop of two rounds: its files, its table, a restart, a changed file; the training stage is replaced."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from simpo_megatron.on_policy import iteration
from tests.support.tiny import make_checkpoint, make_rows, write_rows
from tools import build_pairs, generate_responses, iterate, score_responses

TOOLS: dict[str, Callable[[list[str]], int]] = {
    "generate_responses.py": generate_responses.main,
    "score_responses.py": score_responses.main,
    "build_pairs.py": build_pairs.main,
}


@pytest.fixture
def loop(tmp_path: Path) -> dict[str, Any]:
    """The settings of a loop."""
    rows = [{"id": i, "prompt": row["prompt"]} for i, row in enumerate(make_rows(6))]
    return {
        "folder": str(tmp_path / "loop"),
        "rounds": 2,
        "hf_checkpoint": str(make_checkpoint(tmp_path / "model", num_hidden_layers=1)),
        "prompts": str(write_rows(tmp_path / "prompts.jsonl", rows)),
        "prompts_per_round": 3,
        "processes": 2,
        "generate": {"num_responses": 4, "max_new_tokens": 6, "temperature": 1.0},
        "score": {"scorer": "tests.on_policy.rewards:short"},
        "build": {"truncated-chosen": True},
        "train": {"train_epochs": 1, "global_batch_size": 2},
        "evaluate": {
            "prompts": str(write_rows(tmp_path / "eval.jsonl", [{"prompt": "amber kelp"}])),
            "num_responses": 1,
            "temperature": 0,
            "max_new_tokens": 6,
        },
    }


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the loop ran. Tools run in this process; training copies its model."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command[1:])
        name = Path(command[1]).name
        if name in TOOLS:
            return TOOLS[name](command[2:])
        flags = dict(itertools.pairwise(command))
        shutil.copytree(flags["--hf-checkpoint"], flags["--export-hf"])
        Path(flags["--save"]).mkdir()
        (Path(flags["--save"]) / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        return 0

    monkeypatch.setattr(iteration, "_run", run)
    return commands


def start(settings: dict[str, Any]) -> int:
    file = Path(settings["folder"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    return iterate.main(["--config", str(file)])


def test_two_rounds(loop: dict[str, Any], ran: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(loop) == 0
    folder = Path(loop["folder"])
    names = [Path(command[0]).stem if command[0] != "-m" else "train" for command in ran]
    evaluation = ["generate_responses", "score_responses"]
    one_round = ["generate_responses", "score_responses", "build_pairs", "train", *evaluation]
    assert names == evaluation + one_round * 2
    training = ran[5]
    assert training[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert training[training.index("--load") + 1] == training[training.index("--save") + 1]
    assert str(folder / "round_1" / "model") in ran[8], "round 2 trains the model of round 1"
    asked = [
        [json.loads(line)["id"] for line in (folder / f"round_{n}" / "prompts.jsonl").read_text().splitlines()]
        for n in (1, 2)
    ]
    assert asked == [["0", "1", "2"], ["3", "4", "5"]]
    with (folder / "rounds.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["round"] for row in table] == ["0", "1", "2"]
    assert table[0]["pairs"] == "" and int(table[1]["pairs"]) >= 2 and table[1]["loss"] == "0.5"
    assert float(table[2]["eval/score"]) < 0 and float(table[2]["eval/tokens"]) >= 1
    assert "rounds" in capsys.readouterr().out


def test_it_goes_on_where_it_stopped(
    loop: dict[str, Any], ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = iteration._run

    def fail_at_training(command: list[str]) -> int:
        return 3 if command[1] == "-m" else run(command)

    monkeypatch.setattr(iteration, "_run", fail_at_training)
    assert start(loop) == 2
    assert "round 1: train ended with exit code 3" in capsys.readouterr().err
    before = len(ran)
    monkeypatch.setattr(iteration, "_run", run)
    assert start(loop) == 0
    assert ran[before][0] == "-m", "generate, score and build are not repeated"
    count = len(ran)
    assert start(loop) == 0 and len(ran) == count
    capsys.readouterr()
    loop["generate"]["top_p"] = 0.5
    assert start(loop) == 2
    assert "round 1: generate was done with other settings" in capsys.readouterr().err


def test_a_text_with_a_line_separator_is_measured(tmp_path: Path) -> None:
    """U+2028 ends no line of JSON, and models write it."""
    row = {"responses": [{"content": "amber\u2028kelp", "score": 2.0, "tokens": 3}]}
    for name in ("scored", "eval_scored"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    found = iteration._measured(1, tmp_path)
    assert (found["train/score"], found["eval/score"], found["pairs"]) == (2.0, 2.0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a program with its parent")
def test_a_killed_loop_leaves_no_program_behind() -> None:
    code = "import sys; from simpo_megatron.on_policy.iteration import _run; _run([sys.executable, '-c', sys.argv[1]])"
    program = "import time; print('runs', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, program]
    with subprocess.Popen(command, cwd=iteration.TOOLS.parent, stdout=subprocess.PIPE, text=True) as loop:
        assert loop.stdout is not None and loop.stdout.readline() == "runs\n"
        (child,) = psutil.Process(loop.pid).children()
        loop.kill()
    child.wait(60)  # raises where it still runs


def test_mistakes_are_one_line(loop: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for change, words in (
        ({"rounds": 0}, "rounds 0 must be greater than 0"),
        ({"rounds": "two"}, "rounds is a string; it must be a whole number"),
        ({"nonsense": 1}, "nonsense is not known"),
        ({"generate": {"output": "x"}}, "generate: output is set by the loop itself"),
        ({"train": ["lr"]}, "train is a list; it must be a mapping"),
        ({"train": {"objektive": "dpo"}}, "train: --objektive is not a flag; did you mean --objective?"),
        ({"train": {"dpo_beta": 1}}, "train: --dpo-beta belongs to --objective dpo"),
        ({"generate": {"backend": "server"}}, "generate: --backend server needs --server-url"),
        ({"evaluate": {"prompts": "eval.jsonl", "top_p": 2}}, "evaluate: --top-p 2.0 must be"),
        ({"score": {"scorer": "no_module:f"}}, "score: --scorer no_module:f cannot be imported"),
        ({"score": {"reward_model": "none"}}, "score: --reward-model none is not a folder"),
        ({"build": {"min_margin": 1}}, "build: --min-margin is not a flag"),
        ({"evaluate": {"top_p": 1}}, "evaluate: it needs `prompts`"),
        ({"prompts_per_round": 7}, "prompts_per_round 7 is more than there are prompts"),
        ({"prompts": "none.jsonl"}, "there is no such file"),
    ):
        assert start({**loop, **change, "evaluate": change.get("evaluate", {})}) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    del loop["score"]
    assert start(loop) == 2
    assert "score is missing" in capsys.readouterr().err
