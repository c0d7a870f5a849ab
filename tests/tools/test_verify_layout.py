"""The command line of tools/verify_layout.py; what it computes: `tests/verify`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from simpo_megatron.checkpoint.source import config_alone
from simpo_megatron.config import arguments
from simpo_megatron.config.checkpoint import CheckpointConfig
from simpo_megatron.config.run import OptimizerConfig
from simpo_megatron.errors import UserError
from simpo_megatron.objectives import SimPO
from simpo_megatron.verify import random_weights
from tests.support import families
from tests.support.distributed import WorkerPool, free_environment
from tests.support.planted import PLANTED, planted
from tests.support.tiny import make_checkpoint, make_rows, write_rows
from tools.verify_layout import build_parser, main, parse_arguments

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


def write_config(name: str, file: Path, **settings: Any) -> Path:
    """A config.json alone, of a family of `tests/support/families.py` with two layers."""
    import transformers

    prefix, own = families.MODELS[name]
    config = getattr(transformers, f"{prefix}ForCausalLM").config_class(
        **{**families.SIZES, **own, "num_hidden_layers": 2, **settings}
    )
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**config.to_dict(), "dtype": "float32"}))
    return file


def run_without_weights(
    argv: list[str], temporary: Path, mistake: str | None = None, free: int | None = None, file_bytes: int = 2**30
) -> tuple[int, str, int]:
    """On a rank: exit code, what is printed, and how many files of random weights the rank read."""
    printed, seen = io.StringIO(), []
    read = random_weights.read_hf_checkpoint

    def count_files(path: Path) -> Any:
        hf = read(path)
        seen.extend({tensor.file for tensor in hf.tensors.values()})
        return hf

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(tempfile, "tempdir", str(temporary)))
        enter(mock.patch.object(random_weights, "read_hf_checkpoint", count_files))
        enter(mock.patch.object(random_weights, "MAX_FILE_BYTES", file_bytes))
        enter(mock.patch.dict(os.environ, {"RANK": "0"}))  # no rank waits before it prints an error
        if free is not None:
            enter(mock.patch.object(random_weights, "free_bytes", lambda _: free))
        if mistake is not None:
            enter(planted(mistake))
        enter(contextlib.redirect_stdout(printed))
        enter(contextlib.redirect_stderr(printed))
        return main(argv), printed.getvalue(), len(seen)


def command_line(model: Path, layout: dict[str, Any]) -> list[str]:
    argv = ["--hf-checkpoint", str(model), "--seq-length", "64", "--device", "cpu", "--fp32"]
    return argv + [word for name, value in layout.items() for word in ("--" + name.replace("_", "-"), str(value))]


@pytest.mark.parametrize(
    "name, layout",
    [
        ("olmo3", {"tensor_model_parallel_size": 2}),
        ("qwen3_tied", {"tensor_model_parallel_size": 2}),  # one key head on both ranks
        ("deepseek_v3", {"expert_model_parallel_size": 2}),
        ("deepseek_v2", {"context_parallel_size": 2}),
    ],
)
def test_a_config_alone_is_verified_with_random_weights(
    pool: WorkerPool, tmp_path: Path, name: str, layout: dict[str, Any]
) -> None:
    model = write_config(name, tmp_path / "model" / "model.json")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (first, second) = pool.run(2, run_without_weights, command_line(model, layout), temporary, None, None, 2**16)
    assert first[0] == second[0] == 0, first[1]
    assert f"{model} has no weights: random ones are used, " in first[1] and f" in {temporary}" in first[1]
    assert f"{model} has no tokenizer: 8 pairs of random token ids are used" in first[1]
    assert "WRONG" not in first[1] and "random" not in second[1]
    assert first[2] == second[2] > 1
    assert not list(temporary.iterdir())


def test_random_weights_show_a_planted_mistake(pool: WorkerPool, tmp_path: Path) -> None:
    model = write_config("llama", tmp_path / "model" / "config.json").parent
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    mistake = "labels shifted after slicing"
    world, layout = PLANTED[mistake]
    found = pool.run(world, run_without_weights, command_line(model, layout), temporary, mistake)
    assert [code for code, _, _ in found] == [1] * world and "WRONG in fp32" in found[0][1]
    assert not list(temporary.iterdir())


def test_a_disk_without_room_for_random_weights(pool: WorkerPool, tmp_path: Path) -> None:
    model = write_config("llama", tmp_path / "model" / "config.json")
    found = pool.run(2, run_without_weights, command_line(model, {}), tmp_path, None, 1000)
    for code, text, _ in found:
        assert code == 2 and text.count("\n") == 1
        assert f"the random weights of {model} take " in text and f"but only 1000 B are free in {tmp_path}; " in text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_data_is_used_where_there_is_a_tokenizer(pool: WorkerPool, tmp_path: Path) -> None:
    model, data = make_checkpoint(tmp_path / "model"), write_rows(tmp_path / "pairs.jsonl", make_rows(4))
    (model / "model.safetensors").unlink()
    argv = command_line(model, {})
    argv[argv.index("--seq-length") + 1] = "256"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    [(code, text, _)] = pool.run(1, run_without_weights, [*argv, "--data", str(data)], temporary)
    assert code == 0 and "random ones are used" in text and "4 pairs of 4 rows" in text
    [(code, text, _)] = pool.run(1, run_without_weights, [*argv, "--data", str(tmp_path / "no.jsonl")], temporary)
    assert code == 2 and not list(temporary.iterdir())
    with pytest.raises(UserError, match="--data is missing"):
        parse_arguments(argv)


def test_data_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = write_config("llama", tmp_path / "model" / "config.json")
    with pytest.raises(UserError, match=r"--data needs a tokenizer, and .*config.json has none; leave --data out"):
        parse_arguments(["--hf-checkpoint", str(model), "--data", "pairs.jsonl"])


def test_weights_that_are_there_are_never_replaced(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    assert not config_alone(model)
    shutil.move(model / "model.safetensors", model / "model-00001-of-00002.safetensors")  # the index is missing
    assert not config_alone(model) and not config_alone(tmp_path / "nowhere")


def test_random_weights_and_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simpo_megatron.checkpoint.source import imagine_weights
    from simpo_megatron.models.hf_checkpoint import check_tensors, read_hf_checkpoint, read_hf_config

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(random_weights, "BLOCK", 1000)
    hf = imagine_weights(read_hf_config(write_config("qwen3_moe", tmp_path / "config.json", initializer_range=0.1)))
    values = []
    for seed in (1, 1, 2):
        with contextlib.ExitStack() as stack:
            found = read_hf_checkpoint(random_weights._write(hf, seed, stack))
            check_tensors(found)
            with safe_open(str(next(iter(found.tensors.values())).file), framework="pt") as file:
                values.append({name: file.get_tensor(name) for name in found.tensors})
    assert all(torch.equal(tensor, values[1][name]) for name, tensor in values[0].items())
    assert len({float(tensor.flatten()[0]) for tensor in values[0].values()}) > 0.9 * sum(
        "norm" not in n for n in hf.tensors
    )
    for name, tensor in values[0].items():
        if "norm" in name:
            assert bool((tensor == 1).all())
        else:
            assert not torch.equal(tensor, values[2][name])
            assert abs(float(tensor.std()) / 0.1 - 1) < 0.1 and abs(float(tensor.mean())) < 0.02

    pairs = random_weights.random_pairs(203, 33, 500, 1)
    assert len(pairs) == 500 and 190 < pairs.largest_token < 203 and 30 <= pairs.longest_sequence <= 33
    assert min(pairs.prompt_length.min(), pairs.chosen_length.min(), pairs.rejected_length.min()) == 1
    assert len(random_weights.random_pairs(203, 2, 5, 1)) == 5
