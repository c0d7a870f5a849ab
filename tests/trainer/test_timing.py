"""What shows where the time of a run goes: speed and seconds in the log, traces, garbage collection, W&B."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from simpo_megatron.config.arguments import parse
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import read_hf_config
from simpo_megatron.planning.flops import forward_flops
from simpo_megatron.trainer.profiling import Profiling, check_window
from tests.support.distributed import WorkerPool, free_environment
from tests.support.runs import Inputs, flags, read_rows, run_main, train

PARTS = ("data", "forward_backward", "optimizer")


@pytest.fixture
def base(inputs: Inputs) -> list[str]:
    return flags(inputs.checkpoint, inputs.data, train_iters=3, global_batch_size=4)


def test_a_record_has_speed_and_seconds(pool: WorkerPool, inputs: Inputs, base: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = [*base, "--save", str(run), "--save-interval", "1", "--peak-tflops", "0.5"]
    [(_, out, _), _] = pool.run(2, run_main, argv)
    rows = read_rows(run)
    assert ["seconds/save" in row for row in rows] == [False, True, True]
    for row in rows:
        assert all(row[f"seconds/{part}"] > 0 for part in PARTS)
        assert row["mfu"] == pytest.approx(row["tflops_per_gpu"] / 0.5)
    assert rows[0]["seconds/left"] > 0 and rows[-1]["seconds/left"] == 0
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert all(word in line for line in lines for word in ("TFLOP/s ", "MFU ", "left 0:"))
    # Two ranks share the operations of a step. Tokens and operations are measured over the same seconds.
    architecture = read_hf_config(inputs.checkpoint).architecture
    for_a_token = 2 * rows[0]["tflops_per_gpu"] * 1e12 / rows[0]["tokens_per_second"]
    assert (
        3 * forward_flops(architecture, 1, architecture.num_layers, 0)
        < for_a_token
        < 3 * forward_flops(architecture, 1, 256 * architecture.num_layers, 1)
    )


def test_a_trace_of_the_steps_and_ranks_that_are_asked_for(pool: WorkerPool, base: list[str], tmp_path: Path) -> None:
    argv = [*base, "--profile", "--profile-dir", str(tmp_path), "--profile-ranks", "1"]
    argv += ["--profile-step-start", "2", "--profile-step-end", "3"]
    [message, _] = pool.run(2, train, [*argv, "--profile-step-start", "4", "--profile-step-end", "5"])
    assert message is not None and "--profile-step-start 4 is after the last step of the run, 3; give" in message
    assert pool.run(2, train, argv) == [None, None]
    assert [path.name for path in tmp_path.glob("trace*")] == ["trace_rank_1.json"]
    events = json.loads((tmp_path / "trace_rank_1.json").read_text())["traceEvents"]
    starts = {event["ts"] for event in events if str(event.get("name", "")).startswith("Optimizer.step")}
    assert len(starts) == 1, "one step"


@pytest.mark.parametrize("taken, steps", [(0, [2, 3]), (2, [3]), (3, [])])
def test_a_resumed_run_profiles_the_steps_that_are_left(
    base: list[str], monkeypatch: pytest.MonkeyPatch, taken: int, steps: list[int]
) -> None:
    """What is said when none is left, too."""
    config = parse([*base, "--profile", "--profile-dir", "x", "--profile-step-start", "2", "--profile-step-end", "4"])
    said = check_window(config, 5, taken)
    assert said == ([] if steps else ["--profile writes no trace: the run goes on after step 3, and 3 is past"])
    events: list[str] = []

    class Trace(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return lambda *_: events.append(name)

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Trace())
    profiling = Profiling(config)
    for step in range(taken + 1, 6):
        profiling.before(step)
        events.append(str(step))
        profiling.after(step)
    written = ["start", *map(str, steps), "stop", "export_chrome_trace"] if steps else []
    others = [str(step) for step in range(taken + 1, 6) if step not in steps]
    assert events == [*others[: -2 if steps else 0], *written, *others[-2:]]


def test_a_memory_snapshot_is_written_also_when_memory_runs_out(
    base: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The calls of torch that a GPU needs; on a CPU they are recorded here."""
    config = parse([*base, "--record-memory-history", "--profile-dir", str(tmp_path / "out")])
    calls: list[Any] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: calls.append(Path(name)))
    with pytest.raises(torch.OutOfMemoryError), Profiling(config):
        raise torch.OutOfMemoryError
    assert calls == [{"max_entries": 100_000}, tmp_path / "out" / "memory_rank_0.pickle", {"enabled": None}]
    assert (tmp_path / "out").is_dir()


def _collections(argv: list[str]) -> tuple[str | None, list[bool], bool]:
    """On a rank: the sentence of an error, whether the collector runs by itself in each step, and afterwards."""
    from simpo_megatron.trainer.engine import Engine

    step, found = Engine.train_step, []

    def stepped(self: Engine, *args: Any) -> dict[str, float]:
        found.append(gc.isenabled())
        return step(self, *args)

    Engine.train_step = stepped  # type: ignore[method-assign]
    try:
        return train(argv), found, gc.isenabled()
    finally:
        Engine.train_step = step  # type: ignore[method-assign]


def test_manual_gc_keeps_the_collector_out_of_steps(pool: WorkerPool, base: list[str]) -> None:
    outcome = pool.run(1, _collections, [*base, "--manual-gc", "--manual-gc-interval", "2"])
    assert outcome == [(None, [False] * 3, True)]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--profile-step-end", "10"], "--profile-step-end 10 is the step after the last one to profile; it must"),
        (["--profile-ranks", "first"], "--profile-ranks first is not a rank; give numbers from 0"),
        (["--profile"], "--profile and --record-memory-history write files; give --profile-dir, or --save"),
        (["--peak-tflops", "0"], "--peak-tflops 0.0 must be greater than 0"),
    ],
)
def test_settings_that_cannot_be(base: list[str], more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse([*base, *more])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--record-memory-history"], "--record-memory-history records the memory of a GPU, and this run is on a CPU"),
        (["--profile", "--profile-ranks", "1"], "--profile-ranks 1: the ranks of this run are 0 to 0"),
    ],
)
def test_what_this_run_does_not_have(
    pool: WorkerPool, base: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    [found] = pool.run(1, train, [*base, *more, "--save", str(tmp_path / "run")])
    assert found is not None and message in found


def _with_wandb(argv: list[str]) -> tuple[str | None, list[tuple[int, dict[str, float]]], dict[str, Any]]:
    """On a rank: trains with a module that stands in for wandb, and returns what it got."""
    logged: list[tuple[int, dict[str, float]]] = []
    settings: dict[str, Any] = {}

    class Run:
        def log(self, metrics: dict[str, float], step: int) -> None:
            logged.append((step, metrics))

        def finish(self) -> None:
            settings["finished"] = True

    def init(project: str, config: dict[str, Any]) -> Run:
        settings.update(config, project=project)
        return Run()

    module: Any = ModuleType("wandb")
    module.init, module.Error = init, RuntimeError
    sys.modules["wandb"] = module
    try:
        return train(argv), logged, settings
    finally:
        del sys.modules["wandb"]


def test_weights_and_biases_get_what_the_file_gets(pool: WorkerPool, base: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    [(error, logged, settings)] = pool.run(1, _with_wandb, [*base, "--wandb-project", "simpo", "--save", str(run)])
    assert error is None and settings["project"] == "simpo" and settings["finished"] and settings["lr"] == 1e-3
    assert [{"step": step, **metrics} for step, metrics in logged] == read_rows(run)


def test_weights_and_biases_offline(base: list[str], tmp_path: Path) -> None:
    """The real package, which is an extra: it writes a file, and the log of the run stays as it is."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    line = [sys.executable, "-m", "simpo_megatron.train", *base, "--wandb-project", "simpo"]
    environment = {**free_environment(), "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"rewards/margins" in file.read_bytes()
