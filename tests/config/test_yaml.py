"""`yaml_file.py` and `arguments.read_yaml`: values as people write them, and one sentence for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo_megatron.config.arguments import parse
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.program import exit_code

REQUIRED = ["--hf-checkpoint", "model", "--train-data", "pairs.jsonl"]


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def parse_yaml(path: Path, text: str, *flags: str) -> Config:
    path.write_text(text)
    return parse([*REQUIRED, "--config", str(path), *flags])


def test_flags_win_over_the_file_and_the_file_over_defaults(yaml_file: Path) -> None:
    config = parse_yaml(yaml_file, "train_iters: 5\nlr: 3e-7\nsequence_parallel: false\n", "--lr", "4e-7")
    assert (config.train.train_iters, config.optimizer.lr) == (5, 4e-7)
    for text, switch, fp32 in (
        ("bf16: true", "--fp32", True),
        ("fp32: true", "--bf16", False),
        ("fp32: true", "--no-bf16", True),
        ("bf16: true\nfp32: false", "--fp32", True),
    ):
        train = parse_yaml(yaml_file, f"train_iters: 5\n{text}\n", switch).train
        assert (train.fp32, train.bf16) == (fp32, not fp32)
    assert not parse_yaml(
        yaml_file, "train_iters: 5\nuse_distributed_optimizer: true", "--no-use-distributed-optimizer"
    ).parallel.use_distributed_optimizer


@pytest.mark.parametrize("key", ["global_batch_size", "global-batch-size"])
def test_dashes_are_underscores(yaml_file: Path, key: str) -> None:
    assert parse_yaml(yaml_file, f"train-iters: 1\n{key}: 6").train.global_batch_size == 6


@pytest.mark.parametrize("number", ["1e-6", "1.0e-6", "0.000001", "'1e-6'"])
def test_numbers_as_people_write_them(yaml_file: Path, number: str) -> None:
    """YAML reads 1e-6 as a string."""
    assert parse_yaml(yaml_file, f"train_iters: 1\nlr: {number}").optimizer.lr == 1e-6


def test_yaml_values_take_the_type_of_the_setting(yaml_file: Path) -> None:
    text = "train_iters: 10.0\nsave: out\nsimpo_beta: 2\nmax_length: null\nwandb_project: 7\nsimpo_gamma: 0"
    config = parse_yaml(yaml_file, text)
    assert config.train.train_iters == 10 and isinstance(config.train.train_iters, int)
    assert config.checkpoint.save == Path("out")
    assert isinstance(config.objective.simpo_beta, float) and config.objective.gamma == 0
    assert config.data.max_length == config.data.seq_length // 2
    assert config.log.wandb_project == "7"


@pytest.mark.parametrize(
    "words, text",
    [
        (": train_iter is not a setting; did you mean train_iters?", "train_iter: 5"),
        (": config is not a setting", "config: other.yaml"),
        (": train_iters is 'many'; give a whole number, such as 8", "train_iters: many"),
        (": train_iters is 1.5; give a whole number", "train_iters: 1.5"),
        (": train_iters is inf; give a whole number", "train_iters: .inf"),
        (": train_iters is True; give a whole number", "train_iters: true"),
        (": train_iters is [1]; give a whole number", "train_iters: [1]"),
        (": seed has no value; give a whole number", "seed: null"),
        (": lr is 'fast'; give a number, such as 0.5", "lr: fast"),
        (": lr has no value; give a number", "lr:"),
        ("999; give a number", f"lr: {'9' * 400}"),
        (": fp32 is 1; give true or false", "fp32: 1"),
        (": fp32 is 'yes'; give true or false", "fp32: 'yes'"),
        (": save is 3; give a path, in quotes where it looks like a number", "save: 3"),
        (": wandb_project is [1]; give a text", "wandb_project: [1]"),
        (": objective is ['sft']; give a text", "objective: [sft]"),
        (": train_data is {'a.jsonl': 0.7}; give a source, or a list such as", "train_data: {a.jsonl: 0.7}"),
        (": train_data is [{'a.jsonl': 0.7}]; give a source", "train_data: [{a.jsonl: 0.7}]"),
        (": train_data is [None]; give a source", "train_data: [null]"),
        (" holds a list; it must hold `name: value` lines", "- train_iters"),
        (" holds a single value; it must hold `name: value` lines", "train_iters"),
        (
            ":1: not valid YAML (while parsing a flow sequence, expected ',' or ']', but got '<stream end>')",
            "train_iters: [1",
        ),
        (":2: not valid YAML (expected a single document in the stream, but found another", "seed: 1\n---\nseed: 2"),
        (": not valid YAML (special characters are not allowed); write", "save: \0"),
        (" sets nothing; write lines such as `train_iters: 100` into it, or drop --config", "# nothing"),
        (" sets nothing", "{}"),
        (": seed is set in line 1 and again in line 3; keep one of them", "seed: 1\nlr: 1\nseed: 1"),
        (": train_iters is set in line 1 and again in line 2", "train_iters: 1\ntrain-iters: 2"),
        (": save: the environment variable SIMPO_NOWHERE in $SIMPO_NOWHERE/x is not set", "save: $SIMPO_NOWHERE/x"),
    ],
)
def test_a_wrong_file_is_one_sentence(yaml_file: Path, words: str, text: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_yaml(yaml_file, text)
    message = str(raised.value)
    assert message.startswith(f"--config {yaml_file}") and words in message
    assert "\n" not in message and len(message) < 400


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"save: \xe9")
    for path, words in (
        (tmp_path / "absent.yaml", "{}: there is no such file; check the path"),
        (tmp_path, "{} is a folder; give the YAML file of a run"),
        (latin / "x.yaml", "{} cannot be read: Not a directory; check the file and its permissions"),
        (latin, "{}: byte 7 is not UTF-8; save the file as UTF-8"),
    ):
        assert exit_code("train", lambda path=path: bool(parse([*REQUIRED, "--config", str(path)]))) == 2
        assert capsys.readouterr().err == f"train: --config {words.format(path)}\n"


@pytest.mark.parametrize("text, size", [("1048576", 2**20), ("3KiB", 3072), ("256MiB", 2**28), ("2 GiB", 2**31)])
def test_sizes(yaml_file: Path, text: str, size: int) -> None:
    assert parse([*REQUIRED, "--train-iters", "1", "--head-slab-bytes", text]).model.slab_bytes == size
    assert parse_yaml(yaml_file, f"train_iters: 1\nhead_slab_bytes: {text}").model.slab_bytes == size


@pytest.mark.parametrize("text", ["objective: ppo", "simpo_loss_type: ipo", "tie_policy: keep", "device: tpu"])
def test_choices_bind_in_the_file_too(yaml_file: Path, text: str) -> None:
    name, value = text.split(": ")
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value} is not known; use "):
        parse_yaml(yaml_file, text, "--train-iters", "1")
