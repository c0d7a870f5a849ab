"""The command line of tools/verify_layout.py; what it computes: `tests/verify`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simpo_megatron.errors import UserError
from tests.support.distributed import free_environment
from tests.support.tiny import make_checkpoint, make_rows, write_rows
from tools.verify_layout import parse_arguments

PROGRAM = str(Path(__file__).parents[2] / "tools" / "verify_layout.py")


def test_torchrun_prints_the_verdict(tmp_path: Path) -> None:
    model, data = make_checkpoint(tmp_path / "model"), write_rows(tmp_path / "pairs.jsonl", make_rows(4))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAM]
    argv = ["--hf-checkpoint", str(model), "--data", str(data), "--seq-length", "256", "--context-parallel-size", "2"]
    done = subprocess.run(
        [*command, *argv, "--fp32"], capture_output=True, text=True, env=free_environment(), timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "this layout computes what Hugging Face computes, in fp32: pairs 4, microbatches" in done.stdout
    assert "4 pairs of 4 rows" in done.stdout
    assert "worst 10 of 39" in done.stdout and "WRONG" not in done.stdout


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", make_rows(4))
    argv = ["--hf-checkpoint", str(tmp_path / "nowhere"), "--data", str(data), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, PROGRAM, *argv],
        capture_output=True,
        text=True,
        env=free_environment(),
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("verify_layout.py: ") and "nowhere is not a directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "--train-data is missing"),
        (["--data", "x", "--save", "y"], "--save y has no meaning here; drop it"),
        (["--data", "x", "--train-epochs", "2"], "--train-epochs 2.0 has no meaning here; drop it"),
        (["--data", "x", "--json"], "argument --json: expected one argument; --help lists the flags"),
        (["--data", "x", "--moe-aux-loss-coeff", "0.1"], "--moe-aux-loss-coeff 0.1 has no counterpart"),
        (
            ["--data", "x", "--json", "/nowhere/report.json"],
            "--json /nowhere/report.json cannot be written: No such file",
        ),
        (["--data", "x", "--context-parallel-size", "2", "--seq-length", "100"], "multiple of 8"),
    ],
)
def test_flags_that_mean_nothing_here(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_arguments(["--hf-checkpoint", "model", *argv])
    assert words in str(raised.value)


def test_a_training_file_serves(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("hf_checkpoint: model\ntrain_data: pairs.jsonl\ntrain_epochs: 2\nsave: runs/x\nseq_length: 512\n")
    config, report = parse_arguments(["--config", str(file), "--json", str(tmp_path / "report.json")])
    assert config.data.seq_length == 512 and config.data.train_data == ("pairs.jsonl",)
    assert (config.train.train_iters, config.train.global_batch_size, config.checkpoint.save) == (1, 8, None)
    assert report == tmp_path / "report.json"
