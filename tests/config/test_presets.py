"""Presets: the paper's numbers, below the file, below the flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo_megatron.config.arguments import build_parser, flat, parse
from simpo_megatron.config.presets import PRESETS, describe
from simpo_megatron.errors import UserError
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, run_main

ROOT = Path(__file__).parents[2]
NEEDED = ["--hf-checkpoint", "model", "--train-data", "pairs.jsonl"]


@pytest.mark.parametrize(
    "preset, beta, gamma, lr",  # gamma as a number: ratio times beta
    [
        ("mistral-base", 2.0, 1.6, 3e-7),
        ("mistral-instruct", 2.5, 0.25, 5e-7),
        ("llama3-base", 2.0, 1.0, 6e-7),
        ("llama3-instruct", 2.5, 1.375, 1e-6),
        ("llama3-instruct-v0.2", 10.0, 3.0, 1e-6),
        ("gemma2-instruct", 10.0, 5.0, 8e-7),
    ],
)
def test_the_papers_numbers(preset: str, beta: float, gamma: float, lr: float) -> None:
    config = parse([*NEEDED, "--preset", preset])
    assert (config.objective.simpo_beta, config.optimizer.lr) == (beta, lr)
    assert config.objective.gamma == pytest.approx(gamma, rel=1e-12)
    assert (config.train.train_epochs, config.train.train_iters, config.train.global_batch_size) == (1.0, None, 128)
    assert (config.data.max_length, config.data.max_prompt_length) == (2048, 1800)
    assert (config.optimizer.lr_decay_style, config.optimizer.lr_warmup_fraction) == ("cosine", 0.1)
    for adapters in (["--lora-rank", "4"], ["--load-adapter", "adapter"]):
        assert parse([*NEEDED, "--preset", preset, *adapters]).optimizer.lr == pytest.approx(10 * lr, rel=1e-9)


def test_preset_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: mistral-base\nlr: 4e-7\nsimpo_beta: 3\n")
    config = parse([*NEEDED, "--config", str(file), "--simpo-beta", "4"])
    assert (config.objective.simpo_beta, config.objective.gamma, config.optimizer.lr) == (4.0, 3.2, 4e-7)
    line = describe("mistral-base", flat(config))
    assert line.startswith("preset mistral-base: simpo_gamma_beta_ratio 0.8, train_epochs 1.0")
    assert line.endswith("set otherwise: simpo_beta 4.0 (preset 2.0), lr 4e-07 (preset 3e-07)")
    assert parse([*NEEDED, "--config", str(file), "--preset", "llama3-base"]).objective.gamma == 1.5


def test_the_other_way_to_set_it_drops_the_presets_value() -> None:
    config = parse(
        [*NEEDED, "--preset", "llama3-base", "--simpo-gamma", "0.7", "--train-iters", "9", "--max-length", "512"]
    )
    assert (config.objective.gamma, config.objective.simpo_gamma_beta_ratio) == (0.7, None)
    assert (config.train.train_iters, config.train.train_epochs) == (9, None)
    assert config.data.max_prompt_length == 256
    assert describe("llama3-base", flat(config)).endswith(
        "set otherwise: simpo_gamma 0.7 (preset simpo_gamma_beta_ratio 0.5), train_iters 9 (preset train_epochs 1.0), "
        "max_length 512 (preset 2048), max_prompt_length 256 (preset 1800)"
    )
    with pytest.raises(UserError, match="give one of them"):
        parse([*NEEDED, "--preset", "llama3-base", "--simpo-gamma", "1", "--simpo-gamma-beta-ratio", "0.5"])


def test_an_unknown_preset_lists_those_there_are(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: gemma\n")
    with pytest.raises(UserError, match="--preset gemma is not known; use mistral-base or mistral-instruct"):
        parse([*NEEDED, "--train-iters", "1", "--config", str(file)])


def test_a_run_says_what_the_preset_set(pool: WorkerPool, inputs: Inputs) -> None:
    settings = {"train_iters": 1, "max_length": 256, "global_batch_size": 4, "lr": 3e-7}
    [(code, out, _)] = pool.run(
        1, run_main, flags(inputs.checkpoint, inputs.data, preset="llama3-instruct", **settings)
    )
    assert code == 0
    [line] = [line for line in out.splitlines() if line.startswith("preset ")]
    assert "simpo_beta 2.5, simpo_gamma_beta_ratio 0.55" in line and "lr 3e-07 (preset 1e-06)" in line
    assert "SimPO: beta 2.5, gamma 1.375" in out


def test_list_presets_needs_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(["--list-presets"])
    assert raised.value.code == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["setting", *PRESETS]
    assert {row[0]: row[1:] for row in rows[1:]} == {
        setting: [str(values[setting]) for values in PRESETS.values()] for setting in PRESETS["llama3-base"]
    }


def test_help_has_the_numbers() -> None:
    text = " ".join(build_parser().format_help().split())
    assert "beta, gamma / beta and lr are: mistral-base 2, 0.8, 3e-07; mistral-instruct 2.5, 0.1, 5e-07" in text


def test_the_table_of_the_users_guide_is_that_of_the_presets() -> None:
    text = (ROOT / "simpo_megatron" / "trainer" / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    start = next(i for i, row in enumerate(rows) if row[0] == "setting")
    names = rows[start][1:]
    assert names == list(PRESETS)
    settings = list(PRESETS[names[0]])
    shown = {row[0]: row[1:] for row in rows[start + 2 : start + 2 + len(settings)]}
    assert shown == {setting: [str(PRESETS[name][setting]) for name in names] for setting in settings}
