"""Stopping before the end: signals, minutes and steps; what is resumed; and `SAVE/run.yaml`, which repeats a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.checkpoint.folder import TRACKER
from simpo_megatron.config.arguments import flat, parse
from tests.support.distributed import WorkerPool, free_environment
from tests.support.runs import Inputs, flags, read_rows, run_and_read, run_main, train

ROOT = Path(__file__).parents[2]


def run_signalled(argv: list[str], rank: int, signals: list[int], echo: float = 10.0) -> tuple[int, str]:
    """On a rank: runs the program; `rank` gets the signals in its second step. Exit code and output."""
    import torch.distributed as dist

    from simpo_megatron.trainer import signals as module
    from simpo_megatron.trainer.engine import Engine

    step, before, calls = Engine.train_step, module.ECHO, []
    handlers = [signal.getsignal(number) for number in module.SIGNALS]

    def stepped(self: Engine, *args: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2 and dist.get_rank() == rank:
            for number in signals:
                os.kill(os.getpid(), number)
        return step(self, *args)

    Engine.train_step, module.ECHO = stepped, echo  # type: ignore[method-assign]
    try:
        code, out, err = run_main(argv)
    except SystemExit as left:
        code, out, err = int(str(left.code)), "", ""
    finally:
        Engine.train_step, module.ECHO = step, before  # type: ignore[method-assign]
    assert [signal.getsignal(number) for number in module.SIGNALS] == handlers
    return code, out + err


@pytest.fixture
def base(inputs: Inputs) -> list[str]:
    return flags(inputs.checkpoint, inputs.data, global_batch_size=4, log_interval=1)


def again(folder: Path) -> list[str]:
    return ["--save", str(folder), "--load", str(folder)]


@pytest.mark.parametrize("name, signals", [("SIGUSR1", [signal.SIGUSR1]), ("SIGTERM", [signal.SIGTERM] * 3)])
def test_a_signal_to_one_rank_stops_all_after_the_step(
    pool: WorkerPool, base: list[str], tmp_path: Path, name: str, signals: list[int]
) -> None:
    """Further signals at the same time, as of Slurm and of torchrun, are one. The same command then goes on."""
    whole = run_and_read(pool, 2, base, tmp_path / "whole")
    argv = [*base, *again(tmp_path / "run")]
    outcomes = pool.run(2, run_signalled, [*argv, "--exit-signal-handler"], 1, signals)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    line = f"stopped by {name} after step 2 of 4, and saved in {tmp_path / 'run'}; to resume, start the same command"
    assert line in outcomes[0][1]
    assert (tmp_path / "run" / TRACKER).read_text() == "2"
    assert pool.run(2, train, argv) == [None, None]
    assert [row["loss"] for row in read_rows(tmp_path / "run")] == [row["loss"] for row in whole]


def test_a_second_signal_ends_the_run_at_once(pool: WorkerPool, base: list[str], tmp_path: Path) -> None:
    """The second step is not finished, and the checkpoint of the first one stands."""
    argv = [*base, *again(tmp_path / "run"), "--exit-signal-handler", "--save-interval", "1"]
    [(code, _)] = pool.run(1, run_signalled, argv, 0, [signal.SIGUSR1, signal.SIGTERM], -1.0)
    assert code == 128 + signal.SIGTERM
    assert (tmp_path / "run" / TRACKER).read_text() == "1" and not (tmp_path / "run" / ".lock").exists()


def _run_in_slurm(argv: list[str], more: dict[str, str]) -> tuple[int, str]:
    os.environ |= more
    try:
        return run_signalled(argv, 0, [signal.SIGUSR1])
    finally:
        for name in more:
            del os.environ[name]


def test_signals_are_handled_by_default_in_a_slurm_job(pool: WorkerPool, base: list[str], tmp_path: Path) -> None:
    [(code, out)] = pool.run(1, _run_in_slurm, [*base, "--save", str(tmp_path / "run")], {"SLURM_JOB_ID": "7"})
    assert code == 0 and f"to resume, give --load {tmp_path / 'run'} --save {tmp_path / 'run'}" in out


@pytest.mark.parametrize(
    "more, steps", [(["--exit-interval", "3"], ["3", "4"]), (["--exit-duration-in-mins", "1e-4"], ["1", "2"])]
)
def test_a_run_stops_at_its_step_or_its_minutes(
    pool: WorkerPool, base: list[str], tmp_path: Path, more: list[str], steps: list[str]
) -> None:
    """Each start gets further, also when the step it resumes from is a multiple of the interval."""
    for step in steps:
        [(code, out, _)] = pool.run(1, run_main, [*base, *again(tmp_path / "run"), *more])
        assert code == 0 and (f"stopped by {' '.join(more).replace('1e-4', '0.0001')}" in out) == (step != "4")
        assert (tmp_path / "run" / TRACKER).read_text() == step


@pytest.mark.parametrize("more", [["--exit-signal-handler"], ["--exit-interval", "3"]])
def test_a_run_that_stops_early_needs_a_folder(pool: WorkerPool, base: list[str], more: list[str]) -> None:
    [message] = pool.run(1, train, [*base, *more])
    assert message == f"{more[0]} needs --save: a run that stops early saves a checkpoint to resume from"


# The first start is killed in its third step. The second one and all its processes get SIGUSR1 in its second step, as
# from Slurm: the process that serves Megatron's checkpoint writer, which started with the first checkpoint, among them.
RESTARTED = """
import os, signal, sys
import psutil
from simpo_megatron.trainer.engine import Engine
step, calls = Engine.train_step, []
def struck(self, *args):
    calls.append(1)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if not first and len(calls) == 2:
        me = psutil.Process()
        children = me.children(recursive=True)
        assert children
        for process in (*children, me):
            process.send_signal(signal.SIGUSR1)
    return step(self, *args)
Engine.train_step = struck
if __name__ == "__main__":
    from simpo_megatron.train import main
    sys.exit(main())
"""


def test_torchrun_restarts_a_killed_run_and_slurm_stops_it(pool: WorkerPool, base: list[str], tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RESTARTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "1"]
    base[base.index("--train-iters") + 1] = "5"
    argv = [*base, *again(tmp_path / "run"), "--save-interval", "1", "--exit-signal-handler"]
    environment = {**free_environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # It returns when no process holds its output: the server of the killed start's writers has ended with its rank.
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *argv], env=environment, capture_output=True, text=True, timeout=140
    )
    assert done.returncode == 0 and "iter_0000002, after 8 pairs" in done.stdout, done.stderr
    assert "stopped by SIGUSR1 after step 4 of 5" in done.stdout
    whole = run_and_read(pool, 1, base, tmp_path / "whole")
    assert [row["loss"] for row in read_rows(tmp_path / "run")] == [row["loss"] for row in whole[:4]]


def test_the_record_of_a_run_repeats_it(pool: WorkerPool, inputs: Inputs, tmp_path: Path) -> None:
    """With a preset, a blend with a dollar sign in a path, and settings that replace each other."""
    odd = tmp_path / "a$b.jsonl"
    odd.write_bytes(inputs.data.read_bytes())
    argv = flags(inputs.checkpoint, Path("0.5"), preset="llama3-base", train_iters=2, seq_length=4096)
    place = argv.index("--train-data") + 2
    argv[place:place] = [str(odd).replace("$", r"\$"), "0.5", str(inputs.data)]
    first = run_and_read(pool, 1, argv, tmp_path / "first")
    record = tmp_path / "first" / "run.yaml"
    given, read = flat(parse([*argv, "--save", str(tmp_path / "first")])), flat(parse(["--config", str(record)]))
    assert given | {"transformer_impl": "local"} == read
    text = record.read_text()
    assert "# Command: " in text and "megatron-core 0." in text and "of 1 processes" in text
    second = run_and_read(pool, 1, ["--config", str(record)], tmp_path / "second")
    assert [row["loss"] for row in second] == [row["loss"] for row in first]
