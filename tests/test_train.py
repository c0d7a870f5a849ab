"""The program as a user runs it: good input trains. Wrong input: `test_wrong_input.py`.

Three runs are processes of their own, two of them under torchrun.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.distributed import WorkerPool, free_environment
from tests.support.runs import Inputs, flags, read_rows, run_and_read, run_main, without_speed
from tests.support.tiny import make_rows
from tests.test_wrong_input import truncated_line

ROOT = Path(__file__).parent.parent
RESPONSES = ("chosen", "rejected")
TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    "rank, local_rank, argv, waits, prints",
    [
        (0, 0, ["--fp16"], False, True),
        (1, 1, ["--fp16"], True, False),
        (8, 0, ["--config", "/nowhere/run.yaml"], True, True),
    ],
)
def test_which_rank_prints_an_error(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, argv: list[str], waits: bool, prints: bool
) -> None:
    """Rank 0 prints at once. Another rank waits; if nothing stops it, it prints what may be an error of its own."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    code, _, stderr = run_main(argv)
    assert (code, bool(waited)) == (2, waits)
    assert stderr.count("simpo_megatron.train: ") == prints


def test_useless_rows_are_dropped_counted_and_reported(pool: WorkerPool, inputs: Inputs) -> None:
    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = make_rows(10)
    rows[0]["chosen"] = message("")
    rows[3]["rejected"] = message(" \n")
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[8]["chosen"] = rows[8]["rejected"]
    rows[9]["chosen"] = rows[9]["rejected"]
    path = inputs.with_rows(rows)
    save = inputs.folder / "run"
    argv = flags(inputs.checkpoint, path, train_iters=1, global_batch_size=5, save=save)
    [(code, stdout, stderr)] = pool.run(1, run_main, argv)
    assert (code, stderr) == (0, "")
    assert f"{path}: 5 pairs of 10 rows; dropped 2 with an empty response, 3 with identical responses" in stdout
    assert [row["epoch"] for row in read_rows(save)] == [1.0]


def test_an_epoch_sees_every_pair_once(pool: WorkerPool, inputs: Inputs) -> None:
    """Ten pairs in batches of four: the last batch has two, and is averaged over two."""
    argv = flags(inputs.checkpoint, inputs.data, train_epochs=1, global_batch_size=4)
    at = argv.index("--train-iters")
    rows = run_and_read(pool, 2, argv[:at] + argv[at + 2 :], inputs.folder / "run")
    assert [row["epoch"] for row in rows] == [0.4, 0.8, 1.0]
    tokenizer = AutoTokenizer.from_pretrained(inputs.checkpoint)
    for response in RESPONSES:
        texts = [row[response][-1]["content"] for row in make_rows(10)]
        tokens = sum(len(tokenizer(text).input_ids) + 1 for text in texts)  # and the end of the turn
        lengths = [row[f"response_length/{response}"] for row in rows]
        assert 4 * lengths[0] + 4 * lengths[1] + 2 * lengths[2] == pytest.approx(tokens)


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=free_environment(), capture_output=True, text=True, timeout=300
    )


def torchrun(ranks: int, logs: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the program under torchrun; `logs` gets a file a rank and stream."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return launch([*launcher, "--tee", "3", "--log-dir", str(logs), "-m", "simpo_megatron.train", *argv])


def stream(logs: Path, rank: int, name: str) -> str:
    [path] = logs.glob(f"*/attempt_0/{rank}/{name}.log")
    return path.read_text()


def test_one_process_needs_no_launcher(inputs: Inputs) -> None:
    wrong = truncated_line(inputs)
    save = inputs.folder / "run"
    done = launch(["simpo_megatron.train", *flags(inputs.checkpoint, wrong.settings["train_data"], save=save)])
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert wrong.words[0] in line
    assert not save.exists()


def test_a_resumed_run_prints_no_warning_of_a_library(pool: WorkerPool, inputs: Inputs) -> None:
    save = inputs.folder / "run"
    argv = flags(inputs.checkpoint, inputs.data, train_iters=1)
    run_and_read(pool, 1, argv, save)
    done = launch(["simpo_megatron.train", *argv, "--save", str(save), "--load", str(save), "--train-iters", "2"])
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("step 2/2") and "" not in lines


def test_an_error_under_torchrun_is_printed_once(inputs: Inputs) -> None:
    wrong = truncated_line(inputs)
    logs = inputs.folder / "logs"
    done = torchrun(2, logs, flags(inputs.checkpoint, wrong.settings["train_data"], **TP2))
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(wrong.words[0]) == 1
    lines = stream(logs, 0, "stderr").splitlines()
    assert len(lines) == 1 and wrong.words[0] in lines[0], lines
    assert "exitcode  : 2 " in done.stderr, done.stderr
    assert stream(logs, 1, "stderr") == ""


def test_a_run_under_torchrun(inputs: Inputs) -> None:
    """In bf16, the default: trains, logs, saves and exports."""
    save, export, logs = (inputs.folder / name for name in ("run", "out", "logs"))
    settings = {"train_iters": 2, "valid_data": inputs.data, "save": save, "export_hf": export, **TP2}
    argv = [word for word in flags(inputs.checkpoint, inputs.data, **settings) if word != "--fp32"]
    done = torchrun(2, logs, argv)
    assert done.returncode == 0, done.stderr
    assert stream(logs, 0, "stderr") == stream(logs, 1, "stderr") == stream(logs, 1, "stdout") == ""
    assert "step 2/2" in stream(logs, 0, "stdout")

    before, first, second, after = read_rows(save)
    assert [row["step"] for row in (before, first, second, after)] == [0, 1, 2, 2]
    pairs = [
        f"{name}/{response}" for name in ("rewards", "logps", "response_length", "truncated") for response in RESPONSES
    ]
    names = {*pairs, "loss", "nll_loss", "rewards/margins", "rewards/accuracies", "rewards/above_gamma", "rewards/ties"}
    names |= {"likelihood_accuracy"}
    for row in without_speed([first, second]):
        assert row.keys() == {"step", *names, "grad_norm", "learning_rate", "epoch"}
    assert {"tokens_per_second", "tflops_per_gpu", "memory_gib", "seconds/data"} <= first.keys()
    for row in (before, after):
        whole = {name for name in row if name.startswith("eval/margin_by_length_difference/")}
        assert 2 <= len(whole) <= 5
        assert row.keys() == {"step", "eval/length_spearman", *whole, *(f"eval/{name}" for name in names)}
    assert after["eval/loss"] < before["eval/loss"]
    card = (export / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert "simpo" in yaml.safe_load(head)["tags"] and f"{inputs.checkpoint} trained with" in body
    assert f"| loss | {before['eval/loss']:.4f} | {after['eval/loss']:.4f} |" in body
    assert "simpo_beta: 2.0" in body and "torch " in body and f"--export-hf {export}" in body

    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert list((save / "tensorboard").glob("events*"))
    start, trained = (load_file(path / "model.safetensors") for path in (inputs.checkpoint, export))
    assert start.keys() == trained.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in trained.values())
    assert not any(torch.equal(start[name].bfloat16(), trained[name]) for name in start if "norm" not in name)
    loaded = AutoModelForCausalLM.from_pretrained(export).state_dict()
    assert all(torch.equal(loaded[name], trained[name].to(loaded[name].dtype)) for name in trained)
    assert AutoTokenizer.from_pretrained(export).chat_template
