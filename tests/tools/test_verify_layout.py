"""The command line of tools/verify_layout.py; what it computes: `tests/verify`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simpo_megatron.config import arguments
from simpo_megatron.config.run import CheckpointConfig, OptimizerConfig
from simpo_megatron.errors import UserError
from simpo_megatron.objectives import SimPO
from tests.support.distributed import free_environment
from tests.support.tiny import make_checkpoint, make_rows, write_rows
from tools.verify_layout import build_parser, parse_arguments

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
        ([], "--data is missing; give preferences to verify with"),
        (["--data", "x", "--json"], "argument --json: expected one argument; --help lists the flags"),
        (
            ["--data", "x", "--json", "/nowhere/report.json"],
            "--json /nowhere/report.json cannot be written: No such file",
        ),
        (["--data", "x", "--context-parallel-size", "2", "--seq-length", "100"], "multiple of 8"),
    ],
)
def test_a_wrong_command_line(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_arguments(["--hf-checkpoint", "model", *argv])
    assert words in str(raised.value)


def test_a_training_file_serves(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "hf_checkpoint: model\ntrain_data: pairs.jsonl\ntrain_epochs: 2\nsave: runs/x\nsave_interval: 5\nlr: 3e-7\n"
        "seq_length: 512\nsimpo_beta: 3\nmoe_aux_loss_coeff: 0.01\nvalid_data: held_out.jsonl\nexport_hf: runs/x\n"
    )
    config, report = parse_arguments(["--config", str(file), "--json", str(tmp_path / "report.json")])
    assert config.data.seq_length == 512 and config.data.train_data == ("pairs.jsonl",)
    assert config.objective == SimPO(simpo_beta=3.0)
    assert (config.train.train_iters, config.train.global_batch_size, config.train.moe_aux_loss_coeff) == (1, 8, 0)
    assert (config.checkpoint, config.optimizer, config.data.valid_data) == (
        CheckpointConfig(),
        OptimizerConfig(),
        None,
    )
    assert report == tmp_path / "report.json"


UNUSED = """
--train-data --valid-data --train-iters --train-epochs --fp16 --dry-run --moe-aux-loss-coeff --list-presets
--lr --min-lr --lr-decay-style --lr-warmup-fraction --weight-decay --adam-beta1 --adam-beta2 --adam-eps --clip-grad
--save --load --save-interval --export-hf --log-interval --eval-interval --tensorboard-dir --wandb-project
"""


def test_it_has_the_flags_that_it_uses() -> None:
    shown = {flag for action in build_parser()._actions for flag in action.option_strings}
    training = {flag for action in arguments.build_parser()._actions for flag in action.option_strings}
    assert training - shown >= set(UNUSED.split()) and shown - training == {"--data", "--json"}
    for flag in sorted(set(UNUSED.split()) - {"--train-data", "--list-presets"}):
        with pytest.raises(UserError, match=f"{flag} is not a flag; training has it, and here it would have no effect"):
            parse_arguments(["--data", "x", flag, "1"])
