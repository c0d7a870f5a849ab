"""The command line of tools/plan_layout.py. What it computes is tested in `tests/planning`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.plan_layout import main

MODEL = str(Path(__file__).parents[2] / "examples" / "llama3_8b" / "model.json")


def test_table_answer_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["--model", MODEL, "--gpus", "8", "--compare", "dpo", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "Llama of 8.03e9 parameters" in out and "SimPO: fits from" in out
    assert "log-probs of the reference computed before" in out
    report = json.loads(file.read_text())
    assert report["parameters"] == 8_030_261_248  # of Llama-3-8B
    simpo, dpo = report["objectives"].values()
    best = simpo["layouts"][0]
    assert best["memory"]["total"] == sum(size for name, size in best["memory"].items() if name != "total")
    assert simpo["fewest_gpus"] <= dpo["fewest_gpus"] and dpo["layouts"][0]["memory"]["reference"] > 0


def test_size_of_a_checkpoint_and_idle_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, "--gpus", "8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "a checkpoint of training takes 104.7 GiB (weights 15.0 GiB, optimizer state 89.7 GiB)" in out
    assert "leaves ranks idle" not in out
    assert main(["--model", MODEL, "--gpus", "65536"]) == 0
    assert "above the 128 pairs of a step leaves ranks idle" in " ".join(capsys.readouterr().out.split())


def test_adapters_take_less(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, "--gpus", "8", "--lora-rank", "16"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "SimPO with adapters: fits from 1 GPU" in out
    assert "a checkpoint of training takes 560.0 MiB (weights 80.0 MiB, optimizer state 480.0 MiB)" in out
    assert main(["--model", MODEL, "--gpus", "8", "--lora-rank", "16", "--lora-targets", "q_proj", "v_proj"]) == 0
    assert "a checkpoint of training takes 91.0 MiB" in " ".join(capsys.readouterr().out.split())


def test_the_flags_of_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    host = ["--use-precision-aware-optimizer", "--optimizer-cpu-offload", "--main-grads-dtype", "bf16"]
    assert main(["--model", MODEL, "--gpus", "8", *host]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "SimPO: fits from 1 GPU of 80GiB on" in out
    # Before the state is divided over the 8 ranks each of them copies all parameters in fp32: 4.5 bytes x 8 ranks.
    assert "the optimizer takes up to 269.2 GiB of host memory on a node" in out
    assert "a save takes 15.0 GiB of host memory" in out  # the weights alone


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, "--gpus", "1", "--gpu-memory", "16GiB"]) == 1
    assert "SimPO: no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--gpus", "8", "--gpu-memory", "80 gigs"], "--gpu-memory 80 gigs is not a size"),
        (["--gpus", "0"], "--gpus 0 must be greater than 0"),
        (["--gpus", "8", "--pair-tokens", "9000"], "--pair-tokens 9000 exceeds --seq-length 4096"),
        (["--gpus", "8", "--gpu-memory", "80"], "--gpu-memory 80 is 80 bytes; give the unit too"),
        (["--gpus", "8", "--json", "/nowhere/plan.json"], "/nowhere/plan.json cannot be written: No such file"),
        (["--gpus", "8", "--json", "/"], "--json / cannot be written: Is a directory"),
        (["--gpus", "8", "--exp-avg-dtype", "bf16"], "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer"),
        (["--gpus", "many"], "invalid int value"),
        (["--gpus", "8", "--model", "absent"], "absent does not exist"),
        (["--gpus", "8", "--model", "meta-llama/Meta-Llama-3-70B"], "3-70B does not exist; give a local folder"),
    ],
)
def test_a_mistake_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, *argv]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("plan_layout.py: ") and words in line
