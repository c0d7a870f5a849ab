"""`arguments.py` and `config.py`: flags, YAML, and one sentence naming the flag for everything that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo_megatron.config.arguments import GROUPS, build_parser, flat, heading, own_settings, parse, settable
from simpo_megatron.errors import UserError
from simpo_megatron.objectives import OBJECTIVES

REQUIRED = ["--hf-checkpoint", "model", "--train-data", "pairs.jsonl"]
ENOUGH = [*REQUIRED, "--train-iters", "10"]

# The names other work relies on.
INTERFACE = """
--hf-checkpoint --train-data --valid-data --tensor-model-parallel-size --pipeline-model-parallel-size
--global-batch-size --train-iters --train-epochs --seq-length --lr --min-lr --lr-decay-style --lr-warmup-fraction
--weight-decay --adam-beta1 --adam-beta2 --clip-grad --simpo-beta --simpo-gamma --simpo-gamma-beta-ratio
--simpo-sft-weight --objective --fp32 --seed --log-interval --eval-interval --save --save-interval --load --export-hf
--device --config
"""


def test_defaults() -> None:
    config = parse(ENOUGH)
    assert config.model.hf_checkpoint == Path("model") and config.data.train_data == ("pairs.jsonl",)
    assert (config.objective.name, config.objective.simpo_beta, config.objective.gamma) == ("simpo", 2.0, 1.0)
    assert config.objective.simpo_sft_weight == 0, "the paper's SimPO has no NLL term"
    assert config.train.bf16 and not config.train.fp32
    assert config.parallel.use_distributed_optimizer
    assert config.data.max_length == config.data.seq_length // 2
    assert config.objective.warnings(config.optimizer.lr, 10**10) == []


def test_flags_reach_every_group() -> None:
    flags = """
    --train-epochs 0.5 --tensor-model-parallel-size 2 --sequence-parallel --seq-length 512 --simpo-beta 2.5
    --simpo-gamma-beta-ratio 0.55 --lr 5e-7 --save out --save-interval 3 --fp32 --no-use-distributed-optimizer
    --eval-interval 7
    """
    config = parse([*REQUIRED, *flags.split()])
    assert config.train.train_epochs == 0.5 and config.train.train_iters is None
    assert config.parallel.tensor_model_parallel_size == 2 and config.parallel.sequence_parallel
    assert not config.parallel.use_distributed_optimizer
    assert (config.data.seq_length, config.data.max_length, config.data.max_prompt_length) == (512, 256, 128)
    assert config.objective.gamma == pytest.approx(1.375)
    assert config.optimizer.lr == 5e-7
    assert config.checkpoint.save == Path("out") and config.checkpoint.save_interval == 3
    assert config.train.fp32 and not config.train.bf16
    assert config.log.eval_interval == 7


PP2 = ["--pipeline-model-parallel-size", "2"]
SP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


@pytest.mark.parametrize(
    "argv, words",
    [
        # what argparse sees
        (["--simpo-gam", "1"], "--simpo-gam is not a flag; did you mean --simpo-gamma?"),  # no abbreviations
        (["stray"], "unrecognized arguments: stray"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--global-batch-size", "1.5"], "argument --global-batch-size: invalid int value: '1.5'"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--objective", "ppo"], "argument --objective: invalid choice: 'ppo'"),
        # objectives
        (
            ["--objective", "dpo", "--simpo-beta", "2"],
            "--simpo-beta belongs to --objective simpo and has no effect with --objective dpo; drop it",
        ),
        (["--ipo-beta", "0.1"], "--ipo-beta belongs to --objective ipo and has no effect with --objective simpo"),
        (["--reference-checkpoint", "m"], "--reference-checkpoint has no effect with --objective simpo, which"),
        (["--nll-weight", "1", "--simpo-sft-weight", "1"], "--simpo-sft-weight is the older name of --nll-weight"),
        (["--nll-weight", "-1"], "--nll-weight -1.0 must not be negative"),
        (["--objective", "sft", "--nll-weight", "0"], "--nll-weight 0.0 must be greater than 0"),
        (["--lr-decay-style", "step"], "argument --lr-decay-style: invalid choice"),
        # model and layout
        (["--head", "eager"], "argument --head: invalid choice: 'eager'"),
        (
            ["--head-slab-bytes", "256 megs"],
            "--head-slab-bytes 256 megs is not a size; give a number of bytes, or a size such as 256MiB or 1.5GB",
        ),
        (["--head-slab-bytes", "9" * 400], "9 is not a size; give a number of bytes"),
        (["--head-slab-bytes", "0"], "--head-slab-bytes 0 is not a size"),
        (["--head-slab-bytes", "256"], "--head-slab-bytes 256 is 256 bytes; give the unit too, as in 256M"),
        (["--make-vocab-size-divisible-by", "0"], "--make-vocab-size-divisible-by 0 must be greater than 0"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0 must be greater than 0"),
        (["--pipeline-model-parallel-size", "-1"], "--pipeline-model-parallel-size -1 must be greater than 0"),
        (
            ["--sequence-parallel"],
            "--sequence-parallel needs --tensor-model-parallel-size of at least 2; drop it (where",
        ),
        (["--overlap-param-gather"], "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad"),
        (["--recompute-granularity", "full"], "--recompute-granularity full goes with --recompute-method and"),
        (["--recompute-method", "uniform", "--recompute-num-layers", "1"], "--recompute-granularity full goes with"),
        (["--recompute-method", "uniform"], "--recompute-granularity full goes with"),
        (["--decoder-first-pipeline-num-layers", "1"], "--pipeline-model-parallel-size of at least 2"),
        ([*PP2, "--decoder-last-pipeline-num-layers", "0"], "--decoder-last-pipeline-num-layers 0 must be greater"),
        (["--num-layers-per-virtual-pipeline-stage", "1"], "needs --pipeline-model-parallel-size of at least 2"),
        ([*PP2, "--num-layers-per-virtual-pipeline-stage", "0"], "--num-layers-per-virtual-pipeline-stage 0 must be"),
        (
            ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "0"],
            "--recompute-num-layers 0 must be greater than 0",
        ),
        (["--distributed-timeout-minutes", "0"], "--distributed-timeout-minutes 0 must be greater than 0"),
        (
            [*SP2, "--no-variable-seq-lengths", "--seq-length", "511"],
            "must be a multiple of 2 (--tensor-model-parallel",
        ),
        (
            ["--context-parallel-size", "2", "--seq-length", "1020"],
            "1020 must be a multiple of 8 (4 x --context-parallel",
        ),
        (["--context-parallel-size", "2", "--seq-length", "5"], "use 8"),
        (
            [*SP2, "--no-variable-seq-lengths", "--context-parallel-size", "3", "--seq-length", "90"],
            "multiple of 12 (4 x --context-parallel-size 3 and --tensor-model-parallel-size 2, which cuts rows of "
            "fixed length); use 84 or 96",
        ),
        (["--context-parallel-size", "0"], "--context-parallel-size 0 must be greater than 0"),
        (["--expert-model-parallel-size", "0"], "--expert-model-parallel-size 0 must be greater than 0"),
        (["--moe-aux-loss-coeff", "-1"], "--moe-aux-loss-coeff -1.0 must not be negative"),
        # data
        (["--seq-length", "0"], "--seq-length 0 must be greater than 0"),
        (["--max-length", "0"], "--max-length 0 must be greater than 0"),
        (["--max-length", "1"], "--max-length 1 leaves no room for a prompt and a response"),
        (["--max-prompt-length", "0"], "--max-prompt-length 0 must be greater than 0"),
        (
            ["--seq-length", "100", "--max-length", "51"],
            "--max-length 51 lets a pair outgrow its row; use at most half",
        ),
        (
            ["--max-length", "8", "--max-prompt-length", "8"],
            "--max-prompt-length 8 must be less than --max-length 8",
        ),
        # loss
        (["--simpo-beta", "0"], "--simpo-beta 0.0 must be greater than 0"),
        (["--simpo-beta", "nan"], "--simpo-beta nan must be a finite number"),
        (["--simpo-gamma", "inf"], "--simpo-gamma inf must be a finite number"),
        (["--simpo-gamma", "1", "--simpo-gamma-beta-ratio", "0.5"], "--simpo-gamma and --simpo-gamma-beta-ratio set"),
        (["--simpo-label-smoothing", "0.5"], "--simpo-label-smoothing 0.5 must be at least 0 and less than 0.5"),
        (["--simpo-label-smoothing", "-0.1"], "--simpo-label-smoothing -0.1 must be at least 0"),
        (
            ["--simpo-label-smoothing", "0.1", "--simpo-loss-type", "hinge"],
            "--simpo-label-smoothing has no meaning with --simpo-loss-type hinge",
        ),
        (["--simpo-sft-weight", "-1"], "--simpo-sft-weight -1.0 must not be negative"),
        # training
        (["--fp16"], "--fp16 is not supported: the log-prob sum of a response leaves fp16's range"),
        (["--fp32", "--bf16"], "--fp32 and --bf16 are both on; give one of them"),
        (["--no-bf16"], "--no-bf16 leaves no precision; give --fp32"),
        (["--global-batch-size", "0"], "--global-batch-size 0 must be greater than 0"),
        (["--train-iters", "0"], "--train-iters 0 must be greater than 0"),
        (["--train-epochs", "1"], "give one of --train-iters and --train-epochs, not both"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--seed", "4294967296"], "--seed 4294967296 must be at least 0 and below 2**32"),
        # optimizer
        (["--lr", "0"], "--lr 0.0 must be greater than 0"),
        (["--lr", "inf"], "--lr inf must be a finite number"),
        (["--min-lr", "1"], "--min-lr 1.0 must lie between 0 and --lr 1e-06"),
        (["--min-lr", "-1"], "--min-lr -1.0 must lie between 0 and --lr"),
        (["--lr-warmup-fraction", "1"], "--lr-warmup-fraction 1.0 must be at least 0 and less than 1"),
        (["--adam-beta1", "1"], "--adam-beta1 1.0 must be at least 0 and less than 1"),
        (["--adam-beta2", "-0.5"], "--adam-beta2 -0.5 must be at least 0"),
        (["--adam-eps", "0"], "--adam-eps 0.0 must be greater than 0"),
        (["--weight-decay", "-1"], "--weight-decay -1.0 must not be negative"),
        (["--clip-grad", "-1"], "--clip-grad -1.0 must not be negative"),
        # checkpoints and logging
        (["--save-interval", "5"], "--save-interval needs --save"),
        (["--save", "out", "--save-interval", "0"], "--save-interval 0 must be greater than 0"),
        (["--save", "out", "--export-hf", "out"], "--export-hf out is also the folder of --save"),
        (["--log-interval", "0"], "--log-interval 0 must be greater than 0"),
        (["--eval-interval", "0"], "--eval-interval 0 must be greater than 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_sentence_with_its_flag(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        parse([*ENOUGH, *argv])
    message = str(raised.value)
    assert words in message and "\n" not in message


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--train-data", "d", "--train-iters", "1"], "--hf-checkpoint is missing"),
        (["--hf-checkpoint", "m", "--train-iters", "1"], "--train-data is missing"),
        (["--hf-checkpoint", "m", "--train-data", "d"], "give one of --train-iters and --train-epochs: neither is set"),
        ([*REQUIRED, "--train-epochs", "0"], "--train-epochs 0.0 must be greater than 0"),
    ],
)
def test_what_is_missing(argv: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(argv)


def warnings(argv: list[str], num_parameters: float) -> list[str]:
    """What a run of these flags is warned of, for a model of this size."""
    config = parse(argv)
    return config.objective.warnings(config.optimizer.lr, int(num_parameters))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr", "1e-5"], "--lr 1e-05"),
        (["--simpo-beta", "0.1"], "--simpo-beta 0.1"),
        (["--simpo-beta", "2.5", "--simpo-gamma-beta-ratio", "1.4"], "gamma 3.5 exceeds beta 2.5"),
        (["--simpo-sft-weight", "0.1"], "--simpo-sft-weight 0.1"),
    ],
)
def test_warnings_one_by_one(argv: list[str], words: str) -> None:
    [warning] = warnings([*ENOUGH, *argv], 10**10)
    assert words in warning


def test_small_models_take_larger_steps() -> None:
    assert warnings([*ENOUGH, "--lr", "1e-3"], 10**6) == []


def test_every_flag_of_the_interface_exists() -> None:
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert set(INTERFACE.split()) <= known


def test_help_is_grouped_and_complete(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside a text
    with pytest.raises(SystemExit) as raised:
        parse(["--help"])
    assert raised.value.code == 0
    sections = capsys.readouterr().out.strip().split("\n\n")[2:]  # usage and description come first
    shown = {title: lines for section in sections for title, *lines in [section.split("\n")]}
    own = {cls: own_settings(cls) for cls in OBJECTIVES.values()}
    own |= {cls: [field.name for field in settable(cls)] for cls in GROUPS.values()}
    groups = [cls for cls, names in own.items() if names]
    assert list(shown) == ["options:", "objective:", *(f"{heading(cls)}:" for cls in groups)]
    for cls in groups:
        lines = shown[f"{heading(cls)}:"]
        flags = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
        assert flags == ["--" + name.replace("_", "-") for name in own[cls]]
        for field in settable(cls):
            if field.name not in own[cls]:
                lines = [*lines, *shown["objective:"]]
            assert any(field.metadata["help"] in line for line in lines), field.name


def test_flat_holds_every_setting_as_a_primitive() -> None:
    values = flat(parse([*ENOUGH, "--save", "out"]))
    groups = (OBJECTIVES["simpo"], *GROUPS.values())
    assert set(values) == {"objective", *(field.name for cls in groups for field in settable(cls))}
    assert values["save"] == "out" and values["train_iters"] == 10
    assert all(isinstance(value, str | int | float | bool | None) for value in values.values())
