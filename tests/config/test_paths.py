r"""Paths in flags and files: `~` and environment variables as in a shell, `\\$` for a dollar sign."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo_megatron.config.arguments import parse
from simpo_megatron.errors import UserError
from simpo_megatron.settings import expand, source_value
from tools import build_pairs, hf_to_megatron, inspect_data, megatron_to_hf, plan_layout, preprocess_preferences


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/big/my runs")
    monkeypatch.delenv("SIMPO_NOWHERE", raising=False)


@pytest.mark.parametrize(
    "text, expanded",
    [
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("a/~/b~", "a/~/b~"),
        ("$RUNS/x", "/big/my runs/x"),
        ("${RUNS}x", "/big/my runsx"),
        (r"a\$RUNS", "a$RUNS"),
        ("5$ and $", "5$ and $"),
        ("plain", "plain"),
    ],
)
def test_as_a_shell_expands(text: str, expanded: str) -> None:
    assert expand(text) == expanded


def test_every_source_of_a_blend() -> None:
    assert source_value("0.7 ~/a  0.3 $RUNS/b") == "0.7 /home/me/a  0.3 /big/my runs/b"


@pytest.mark.parametrize("quote", ["", "'"])
def test_file_and_flags_alike(tmp_path: Path, quote: str) -> None:
    values = {
        "hf_checkpoint": "~/model",
        "train_data": "$RUNS/pairs.jsonl",
        "save": "~/runs/x",
        "export_hf": "${RUNS}/hf",
        "tensorboard_dir": "~/tb",
    }
    file = tmp_path / "run.yaml"
    file.write_text("train_iters: 1\n" + "".join(f"{name}: {quote}{value}{quote}\n" for name, value in values.items()))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    config = parse(["--config", str(file)])
    assert config == parse(["--train-iters", "1", *flags])
    assert config.checkpoint.save == Path("/home/me/runs/x") and config.model.export_hf == Path("/big/my runs/hf")
    assert config.data.train_data == ("/big/my runs/pairs.jsonl",)


def test_a_list_of_sources(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train_iters: 1\nhf_checkpoint: m\ntrain_data: [~/a, 'b c', $RUNS/d]\n")
    assert parse(["--config", str(file)]).data.train_data == ("/home/me/a", "b c", "/big/my runs/d")


def test_a_variable_that_is_not_set_is_named() -> None:
    for words in ("--save $SIMPO_NOWHERE/x", "--train-data a ${SIMPO_NOWHERE}/x", "--config $SIMPO_NOWHERE"):
        with pytest.raises(UserError, match=r"the environment variable SIMPO_NOWHERE in \$.* is not set; set it, or"):
            parse(words.split())


def test_the_tools_expand_too(capsys: pytest.CaptureFixture[str]) -> None:
    for program, flags in (
        (build_pairs, "--data ~/p --output $SIMPO_NOWHERE/x"),
        (inspect_data, "--data $SIMPO_NOWHERE/x --hf-checkpoint m"),
        (preprocess_preferences, "--data d --hf-checkpoint m --output-prefix $SIMPO_NOWHERE/x"),
        (hf_to_megatron, "--hf-checkpoint m --save $SIMPO_NOWHERE/x"),
        (megatron_to_hf, "--load m --save $SIMPO_NOWHERE/x"),
        (plan_layout, "--gpus 8 --hf-checkpoint $SIMPO_NOWHERE/x"),
    ):
        assert program.main(flags.split()) == 2
        assert "variable SIMPO_NOWHERE in $SIMPO_NOWHERE/x is not set" in capsys.readouterr().err
