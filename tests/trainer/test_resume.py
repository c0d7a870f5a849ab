"""What a run may change when it goes on, what it takes from another run, and what it does when nothing is left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from simpo_megatron.checkpoint.folder import TRACKER
from simpo_megatron.config.arguments import flat, parse
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.trainer.progress import Progress
from simpo_megatron.trainer.resume import NOT_OF_THE_RUN, REFUSED, SavedRun, follow
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, read_rows, run_and_read, run_main, train, without_speed

README = Path(__file__).parents[2] / "simpo_megatron" / "trainer" / "README.md"
BATCH = 8


@pytest.fixture
def base(inputs: Inputs) -> list[str]:
    return flags(inputs.checkpoint, inputs.data, train_iters=2, global_batch_size=BATCH)


@pytest.fixture
def saved(pool: WorkerPool, inputs: Inputs, base: list[str]) -> Path:
    """A SimPO run of two steps."""
    folder = inputs.folder / "run"
    run_and_read(pool, 1, base, folder)
    return folder


def resume(folder: Path, *more: str) -> list[str]:
    return ["--save", str(folder), "--load", str(folder), "--train-iters", "4", *more]


def schedule(lr: float, min_lr: float = 0.0, steps: int = 4, warmup: int = 0, style: str = "cosine") -> list[float]:
    """The learning rates of a run that has this schedule from its first step, by Megatron's scheduler."""
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    total = steps * BATCH
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, lr, min_lr, warmup * BATCH, total, style, 0.0, 0.0, total, "constant"
    )
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(BATCH)
    return rates


def test_another_objective_is_refused(pool: WorkerPool, inputs: Inputs, base: list[str]) -> None:
    sft, export = inputs.folder / "sft", inputs.folder / "aligned"
    run_and_read(pool, 1, [*base, "--objective", "sft"], sft)
    argv = [*base, "--load", str(sft), "--save", str(inputs.folder / "simpo"), "--export-hf", str(export)]
    for more in ([], ["--dry-run"]):
        [(code, _, stderr)] = pool.run(1, run_main, [*argv, *more])
        [line] = stderr.splitlines()
        assert code == 2 and f"--load {sft} is a run of --objective sft, not simpo" in line
        assert "continue it with --objective sft" in line and "with --finetune" in line
    assert not export.exists() and not (inputs.folder / "simpo").exists()


@pytest.mark.parametrize("optimizer", ["use_distributed_optimizer", "no_use_distributed_optimizer"])
def test_finetune_takes_weights_alone(pool: WorkerPool, inputs: Inputs, base: list[str], optimizer: str) -> None:
    """At another layout: the run is that which starts from the export of the other run."""
    sft, export = inputs.folder / "sft", inputs.folder / "sft export"
    argv = [*base, "--objective", "sft", "--lr", "1e-2", "--export-hf", str(export)]
    run_and_read(pool, 2, [*argv, "--tensor-model-parallel-size", "2", "--" + optimizer.replace("_", "-")], sft)
    layout = ["--pipeline-model-parallel-size", "2"]
    ours = run_and_read(pool, 2, [*base, *layout, "--load", str(sft), "--finetune"], inputs.folder / "simpo")
    argv = [*base, *layout, "--hf-checkpoint", str(export)]
    theirs = run_and_read(pool, 2, argv, inputs.folder / "from the export")
    assert without_speed(ours) == without_speed(theirs) and [row["step"] for row in ours] == [1, 2]
    assert [row["learning_rate"] for row in ours] == schedule(1e-3, steps=2)[:2]
    [(code, stdout, _)] = pool.run(1, run_main, [*base, "--load", str(sft), "--finetune", "--dry-run"])
    assert code == 0 and f"{sft}/iter_0000002" in stdout


def test_finetune_needs_another_folder(pool: WorkerPool, inputs: Inputs, base: list[str], saved: Path) -> None:
    """It serves a run of the same objective too."""
    other = inputs.folder / "other"
    [message] = pool.run(1, train, [*base, "--finetune", "--load", str(saved), "--save", str(saved)])
    assert f"--save {saved} holds the run that --finetune starts from; choose a new folder" in message
    [message] = pool.run(1, train, [*base, "--finetune", "--load", str(other), "--save", str(other)])
    assert f"--load {other} has no {TRACKER}" in message
    assert [row["step"] for row in run_and_read(pool, 1, [*base, "--finetune", "--load", str(saved)], other)] == [1, 2]
    [message] = pool.run(1, train, [*base, "--finetune", "--load", str(saved), "--save", str(other)])
    assert f"resume it with --load {other} and without --finetune" in message
    with pytest.raises(UserError, match="--finetune needs --load"):
        parse([*base, "--finetune"])


def groups_of_a_resumed_run(argv: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """On a rank: trains, and returns what is printed and the optimizer's parameter groups after the last step."""
    from simpo_megatron.trainer import loading

    load, engines = loading.load, []

    def load_and_keep(engine: Any, directory: Path) -> None:
        load(engine, directory)
        engines.append(engine)

    loading.load = load_and_keep
    try:
        code, stdout, stderr = run_main(argv)
    finally:
        loading.load = load
    assert (code, stderr) == (0, "")
    groups = engines[0].optimizer.param_groups
    return stdout, [{name: value for name, value in group.items() if name != "params"} for group in groups]


@pytest.mark.parametrize("optimizer", ["--use-distributed-optimizer", "--no-use-distributed-optimizer"])
def test_flags_win_and_are_printed(pool: WorkerPool, inputs: Inputs, base: list[str], optimizer: str) -> None:
    folder = inputs.folder / "run"
    run_and_read(pool, 1, [*base, optimizer], folder)
    changed = ["--lr", "1e-5", "--min-lr", "1e-6", "--lr-warmup-fraction", "0.5", "--lr-decay-style", "linear"]
    changed += ["--weight-decay", "0.25", "--adam-beta2", "0.9", "--simpo-beta", "10"]
    [(stdout, groups)] = pool.run(1, groups_of_a_resumed_run, [*base, optimizer, *resume(folder, *changed)])
    rates = [row["learning_rate"] for row in read_rows(folder)]
    assert rates == schedule(1e-3, steps=2)[:2] + schedule(1e-5, 1e-6, warmup=2, style="linear")[2:]
    assert {group["weight_decay"] for group in groups} == {0.25, 0.0}, "norms are not decayed"
    assert {group["betas"] for group in groups} == {(0.9, 0.9)}
    assert [line.removeprefix("resumed with ") for line in stdout.splitlines() if "resumed with" in line] == [
        "simpo_beta 10.0, was 2.0",
        "train_iters 4, was 2",
        "lr 1e-05, was 0.001",
        "min_lr 1e-06, was 0.0",
        "lr_decay_style linear, was cosine",
        "lr_warmup_fraction 0.5, was 0.1",
        "weight_decay 0.25, was 0.0",
        "adam_beta2 0.9, was 0.999",
    ]


@pytest.mark.parametrize(
    "before, now, line",
    [
        (
            ["--simpo-gamma", "1.5"],
            ["--simpo-gamma-beta-ratio", "0.5"],
            "simpo_gamma_beta_ratio 0.5, was simpo_gamma 1.5",
        ),
        (["--simpo-gamma", "1.5"], [], "simpo_gamma not set, was 1.5"),
        (["--train-iters", "4"], ["--train-epochs", "2"], "train_epochs 2.0, was train_iters 4"),
        (["--fp32"], ["--bf16"], "bf16 True, was fp32 True"),
    ],
)
def test_one_change_is_one_line(before: list[str], now: list[str], line: str) -> None:
    """Also where a setting takes the place of another."""

    def config(more: list[str]) -> Config:
        length = [] if more[:1] in (["--train-iters"], ["--train-epochs"]) else ["--train-iters", "4"]
        return parse(["--hf-checkpoint", "m", "--train-data", "d", *length, *more])

    saved = SavedRun(Path("run"), flat(config(before)), Progress(0, 0))
    assert follow(config(now), saved)[1] == [f"resumed with {line}"]


def test_the_checkpoints_schedule_where_the_user_asks_for_it(pool: WorkerPool, base: list[str], saved: Path) -> None:
    use = "--use-checkpoint-opt-param-scheduler"
    changed = ["--lr", "1e-5", "--weight-decay", "0.25"]
    [(stdout, groups)] = pool.run(1, groups_of_a_resumed_run, [*base, *resume(saved, *changed, use)])
    assert "kept lr 0.001 of the checkpoint, not 1e-05" in stdout
    assert "kept weight_decay 0.0 of the checkpoint, not 0.25" in stdout
    rates = [row["learning_rate"] for row in read_rows(saved)]
    assert rates == schedule(1e-3, steps=2) and rates[2:] == [0, 0], "its decay ended after two steps"
    assert {group["weight_decay"] for group in groups} == {0.0}
    with pytest.raises(UserError, match="give one of them"):
        parse([*base, use, "--override-opt-param-scheduler"])
    [message] = pool.run(1, train, [*base, *resume(saved, "--lr", "1e-5", "--no-override-opt-param-scheduler")])
    assert "was saved with --lr 0.001, not --lr 1e-05; resume with the same" in message


def test_an_optimizer_that_cannot_change_the_precision(pool: WorkerPool, inputs: Inputs, base: list[str]) -> None:
    folder = inputs.folder / "run"
    base = [*base, "--no-use-distributed-optimizer"]
    run_and_read(pool, 1, base, folder)
    [message] = pool.run(1, train, [word for word in [*base, *resume(folder)] if word != "--fp32"])
    assert "was saved in fp32 without the distributed optimizer" in message and "--finetune" in message


def test_the_table_of_the_readme_names_every_setting_once(base: list[str]) -> None:
    section = README.read_text(encoding="utf-8").partition("## Resuming")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| **")]
    table = {title.strip(" *"): set(re.findall(r"`(\w+)`", text)) for title, text in rows}
    settings = {**flat(parse(base)), **flat(parse([*base, "--objective", "sft"]))}
    wins = settings.keys() - {*REFUSED, *NOT_OF_THE_RUN}
    assert {*REFUSED, *NOT_OF_THE_RUN} <= settings.keys() and not set(REFUSED) & set(NOT_OF_THE_RUN)
    assert table == {"refused": set(REFUSED), "wins, printed": wins, "not of the run": set(NOT_OF_THE_RUN)}


def test_the_same_command_after_the_end(pool: WorkerPool, inputs: Inputs, base: list[str]) -> None:
    save, export = inputs.folder / "run", inputs.folder / "out"
    argv = [*base, "--save", str(save), "--load", str(save)]
    assert pool.run(2, train, argv) == [None, None]  # as if it was killed between the last save and the export
    whole = [*argv, "--export-hf", str(export)]
    record, other = (save / "run.yaml").read_text(), ["--lr", "1e-5"]
    [(code, stdout, _)] = pool.run(1, run_main, argv)
    assert (code, stdout) == (0, f"nothing is left to do: the run of {save} has ended\n")
    for command in (argv, whole):
        [(code, _, stderr)] = pool.run(1, run_main, [*command, *other])
        assert code == 2 and "nothing would be trained; choose another --save" in stderr
        assert "has ended, and this command differs from it (resumed with lr 1e-05, was 0.001)" in stderr
    held_out = [*argv, "--valid-data", str(inputs.data)]
    assert "eval at step 2" in pool.run(1, run_main, held_out)[0][1], "its evaluation was missing"
    assert "nothing is left to do" in pool.run(1, run_main, argv)[0][1]
    assert (save / "run.yaml").read_text() == record, "nothing has been trained with other settings"
    [(code, stdout, _)] = pool.run(1, run_main, whole)
    assert code == 0 and f"exported to {export}" in stdout and "resumed with" not in stdout
    written = (export / "model.safetensors").stat().st_mtime_ns
    outcomes = pool.run(2, run_main, whole)
    assert [(code, stderr) for code, _, stderr in outcomes] == [(0, ""), (0, "")]
    assert outcomes[0][1] == f"nothing is left to do: the run of {save} has ended, and {export} is its export\n"
    assert (export / "model.safetensors").stat().st_mtime_ns == written
    [(code, _, stderr)] = pool.run(1, run_main, [*whole, "--train-iters", "3"])
    assert code == 2 and f"{export} is not empty" in stderr, "it is the export of an earlier step"
    [(code, _, stderr)] = pool.run(1, run_main, [*whole, "--head", "plain"])
    assert code == 2 and "has ended, and this command differs from it (resumed with head plain, was fused)" in stderr
    assert (save / TRACKER).read_text() == "2"

    shutil.move(export, inputs.folder / "moved")
    assert pool.run(1, train, whole) == [None]
    assert (export / "model.safetensors").read_bytes() == (inputs.folder / "moved/model.safetensors").read_bytes()
    (export / "model.safetensors").unlink()
    [(code, _, stderr)] = pool.run(1, run_main, whole)
    assert code == 2 and f"{export} is not empty" in stderr


def test_a_second_run_is_not_taken_for_the_first(pool: WorkerPool, inputs: Inputs, base: list[str]) -> None:
    """The folder of the run was emptied and filled again; the export is that of the first."""
    save, export = inputs.folder / "run", inputs.folder / "out"
    argv = [*base, "--save", str(save), "--load", str(save)]
    assert pool.run(1, train, [*argv, "--export-hf", str(export)]) == [None]
    shutil.rmtree(save)
    assert pool.run(1, train, argv) == [None]
    [message] = pool.run(1, train, [*argv, "--export-hf", str(export)])
    assert f"{export} is not empty" in message
