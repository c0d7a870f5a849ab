"""A wrong name is answered with the right one, and the table of the page for users of TRL is that of the code."""

from __future__ import annotations

import ast
import dataclasses
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from simpo_megatron.config.arguments import build_parser, flat, parse
from simpo_megatron.config.other_names import COUNTERPARTS, MEGATRON_LM, SIMPO_REPOSITORY, TRL
from simpo_megatron.errors import UserError
from simpo_megatron.objectives.measured import PAIR_METRICS
from simpo_megatron.settings import flag
from tools import (
    build_pairs,
    hf_to_megatron,
    inspect_data,
    megatron_to_hf,
    plan_layout,
    preprocess_preferences,
    verify_layout,
)

PAGE = (Path(__file__).parents[2] / "simpo_megatron" / "trainer" / "FROM_TRL.md").read_text(encoding="utf-8")
# Fields of CPOConfig and TrainingArguments in older releases.
OLDER = {"max_prompt_length", "warmup_ratio", "truncation_mode", "logging_dir", "torch_dtype"}


def shown_flags() -> set[str]:
    return {text for action in build_parser()._actions for text in action.option_strings}


def test_every_counterpart_is_a_flag() -> None:
    targets = {flag(name) for found in COUNTERPARTS.values() for name in found.settings}
    assert targets <= shown_flags()
    assert all(found.settings or found.note for found in COUNTERPARTS.values())
    assert len(COUNTERPARTS) == len(MEGATRON_LM) + len(SIMPO_REPOSITORY) + len(TRL), "a name stands in two tables"


def test_every_name_of_trl_is_a_field_of_trl() -> None:
    cpo, trl = pytest.importorskip("trl.experimental.cpo"), pytest.importorskip("trl")
    classes = (cpo.CPOConfig, trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments)
    fields = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert set(TRL) - fields <= OLDER
    own = {field.name for field in dataclasses.fields(cpo.CPOConfig)} - {
        field.name for field in dataclasses.fields(trl.DPOConfig)
    }
    described_elsewhere = {"generate_during_eval", "is_encoder_decoder"}
    assert own - described_elsewhere <= set(TRL), "CPOConfig has a field that the table lacks"


def test_the_defaults_of_trl_that_are_stated() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    defaults = {field.name: field.default for field in dataclasses.fields(cpo.CPOConfig)}
    for name, words in (
        ("beta", "TRL's is 0.1"),
        ("simpo_gamma", "TRL's is 0.5"),
        ("cpo_alpha", "TRL's is 1"),
        ("num_train_epochs", "TRL's is 3"),
        ("learning_rate", "default 1e-6, as in TRL"),
        ("lr_scheduler_type", "TRL's is linear"),
        ("max_length", "TRL's is 1024"),
        ("logging_steps", "TRL's is 10"),
        ("save_steps", "TRL's is 500"),
    ):
        stated = words.replace("default ", "").replace(", as in TRL", "").removeprefix("TRL's is ")
        value = defaults[name]
        assert words in TRL[name].note and (stated == value or float(stated) == value), name


def test_the_page_shows_the_table() -> None:
    def row(name: str) -> str:
        settings = ", ".join(f"`{flag(setting)}`" for setting in TRL[name].settings) or "none"
        return f"| `{name}` | {settings} | {TRL[name].note} |".replace("|  |", "| |")

    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert rows[: len(TRL)] == [row(name) for name in TRL]


def test_the_example_of_the_page_is_one_run_in_both() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    python, shell = (PAGE.partition(f"```{language}\n")[2].partition("```")[0] for language in ("python", "bash"))
    call = ast.parse(python).body[0]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    theirs = {word.arg: ast.literal_eval(word.value) for word in call.value.keywords}
    assert set(theirs) <= {field.name for field in dataclasses.fields(cpo.CPOConfig)}
    ours = flat(parse(shlex.split(shell.replace("\\\n", " ").partition("simpo_megatron.train ")[2])))
    pairs = theirs.pop("per_device_train_batch_size") * theirs.pop("gradient_accumulation_steps") * 8
    assert ours["global_batch_size"] == pairs and (theirs.pop("loss_type"), ours["objective"]) == ("simpo", "simpo")
    for name, value in theirs.items():
        assert ours[TRL[name].settings[0]] == value, name


def test_the_page_names_metrics_that_there_are() -> None:
    lines = PAGE.partition("## Metrics")[2].splitlines()
    named = [line.split("|")[2].strip(" `") for line in lines if line.startswith("| `")]
    ours = {metric.name for metric in PAIR_METRICS} | {"grad_norm", "learning_rate", "epoch", "eval/rewards/margins"}
    assert len(named) > 8 and set(named) - {"none"} <= ours


@pytest.mark.parametrize(
    "word, hint",
    [
        ("--beta", "did you mean --simpo-beta? (default 2; TRL's is 0.1; other objectives have a beta of their own)"),
        ("--gamma-beta-ratio", "did you mean --simpo-gamma-beta-ratio?"),
        ("--micro-batch-size", "did you mean --global-batch-size or --seq-length? (a microbatch is one packed row of"),
        ("--per_device_train_batch_size", "did you mean --global-batch-size? (the pairs of a step, over all processes"),
        ("--learning_rate", "did you mean --lr?"),
        ("--learning-rat", "did you mean --lr?"),
        ("--train_data", "did you mean --train-data?"),
        ("--train-dat=x", "did you mean --train-data?"),
        ("--output_dir", "did you mean --save or --export-hf?"),
        ("-lr", "did you mean --lr?"),
        ("--ld-alpha", "LD-DPO is not supported"),  # not a typo of --rdpo-alpha
        ("--optim", "the optimizer is Adam with decoupled weight decay"),
        ("--num-layers", "did you mean --hf-checkpoint? (its config.json describes the model)"),
        ("--use-peft", "did you mean --lora-rank? (a rank trains adapters)"),
        ("--attention-dropout", "a run has no dropout but --lora-dropout"),
        ("--load_in_4bit", "quantized weights are not supported; adapters train on weights in bf16, with --lora-rank"),
        ("--nothing-like-it", "--help lists the flags"),
    ],
)
def test_an_unknown_flag(word: str, hint: str) -> None:
    with pytest.raises(UserError) as raised:
        parse([word, "1"])
    assert str(raised.value).startswith(f"{word.partition('=')[0]} is not a flag; {hint}")


@pytest.mark.parametrize(
    "key, hint",
    [
        ("learning_rate", "did you mean lr? (default 1e-6, as in TRL)"),
        ("gradient-accumulation-steps", "did you mean global_batch_size? (the pairs of a step"),
        ("cpo_alpha", "did you mean simpo_sft_weight? (default 0; TRL's is 1)"),
        ("loss_type", "did you mean objective or simpo_loss_type?"),
        ("train_iter", "did you mean train_iters?"),
        ("lora_target_modules", "did you mean lora_targets? (default all projections; embeddings have no adapters)"),
        ("nothing_like_it", "--help lists them"),
    ],
)
def test_an_unknown_key(tmp_path: Path, key: str, hint: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{key}: 1\n")
    with pytest.raises(UserError) as raised:
        parse(["--config", str(file)])
    assert str(raised.value).startswith(f"--config {file}: {key} is not a setting; {hint}")


@pytest.mark.parametrize(
    "program, word, hint",
    [
        (build_pairs, "--dat", "did you mean --data?"),
        (inspect_data, "--max_length", "did you mean --max-length?"),
        (inspect_data, "--simpo-beta", "training has it, and here it would have no effect; drop it"),
        (preprocess_preferences, "--save", "training has it, and here it would have no effect; drop it"),
        (hf_to_megatron, "--hf-chekpoint", "did you mean --hf-checkpoint?"),
        (megatron_to_hf, "--max-mem", "did you mean --max-memory?"),
        (plan_layout, "--gpu", "did you mean --gpus?"),
        (verify_layout, "--lr", "training has it, and here it would have no effect; drop it"),
        (verify_layout, "--jsn", "did you mean --json?"),
    ],
)
def test_the_tools(program: ModuleType, word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They say it before they ask for what is missing."""
    assert program.main([word, "x"]) == 2
    name = program.__name__.rpartition(".")[2]
    assert capsys.readouterr().err == f"{name}.py: {word} is not a flag; {hint}\n"


@pytest.mark.parametrize(
    "program, old, new",
    [
        (build_pairs, "--input", "--data"),
        (preprocess_preferences, "--input", "--data"),
        (preprocess_preferences, "--train-data", "--data"),
        (inspect_data, "--train-data", "--data"),
        (megatron_to_hf, "--hf-reference", "--hf-checkpoint"),
        (plan_layout, "--model", "--hf-checkpoint"),
        (verify_layout, "--train-data", "--data"),
    ],
)
def test_old_names_are_accepted_and_hidden(
    program: ModuleType, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(["--help"])
    text = capsys.readouterr().out.partition("options:")[2]
    assert f"  {new} " in text and f"  {old} " not in text
    assert program.main([old]) == 2
    assert f"argument {new}: expected" in capsys.readouterr().err
