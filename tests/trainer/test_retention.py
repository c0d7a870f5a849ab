"""Which checkpoints stay, what the folder of one looks like while it is written or deleted, and --async-save."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.checkpoint.folder import TRACKER, iteration_folder, latest_step
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.config.arguments import parse
from simpo_megatron.config.checkpoint import CheckpointConfig
from simpo_megatron.errors import UserError
from simpo_megatron.trainer.retention import best_step, complete_steps, delete_old, remove_leftovers
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, run_and_read, run_main, train

REQUIRED = ["--hf-checkpoint", "m", "--train-data", "d", "--train-iters", "4"]


def make_folders(root: Path, steps: range) -> None:
    for step in steps:
        iteration_folder(root, step).mkdir()
        (iteration_folder(root, step) / FORMAT_FILE).write_text("{}")


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"keep_last": 1}, [6, 7, 8]),
        ({"keep_last": 3}, [4, 5, 6, 7, 8]),
        ({"keep_last": 1, "keep_best": "eval/loss"}, [2, 6, 7, 8]),
        ({"keep_last": 1, "keep_best": "eval/rewards/accuracies"}, [5, 6, 7, 8]),
        ({"save_retain_interval": 2, "save_interval": 1}, [2, 4, 6, 7, 8]),
        ({"save_retain_interval": 3, "save_interval": 1, "keep_last": 2}, [3, 5, 6, 7, 8]),
    ],
)
def test_what_stays(tmp_path: Path, settings: dict[str, Any], kept: list[int]) -> None:
    """Step 6 is the newest. 7 and 8 are of a run that went further before it was resumed from an earlier step."""
    make_folders(tmp_path, range(1, 9))
    (tmp_path / "iter_0000099").mkdir()  # not complete: not ours to delete
    losses = {1: 9.0, 2: 0.5, 3: 0.7, 5: 0.5, 8: 0.1}
    rows = [{"step": step, "eval/loss": loss, "eval/rewards/accuracies": step % 6} for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "eval/lo')
    delete_old(tmp_path, 6, CheckpointConfig(save=tmp_path, **settings))
    assert complete_steps(tmp_path) == kept
    assert (tmp_path / "iter_0000099").is_dir() and not list(tmp_path.glob(".*"))


def test_the_best_step_has_a_value(tmp_path: Path) -> None:
    assert best_step(tmp_path, "loss", [1, 2]) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.0}\n')
    assert best_step(tmp_path, "loss", [1, 2]) == 2


def test_leftovers_never_look_complete(tmp_path: Path) -> None:
    make_folders(tmp_path, range(1, 3))
    for step, name in ((1, ".unfinished-iter_0000001-ab"), (2, ".deleted-iter_0000002")):
        iteration_folder(tmp_path, step).rename(tmp_path / name)
    assert complete_steps(tmp_path) == []
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--keep-last", "1"], "--keep-last needs --save"),
        (["--async-save"], "--async-save needs --save"),
        (["--save", "s", "--keep-last", "0"], "--keep-last 0 must be greater than 0"),
        (["--save", "s", "--save-retain-interval", "4"], r"4 must be a multiple of --save-interval \(not set\)"),
        (["--save", "s", "--save-retain-interval", "4", "--save-interval", "3"], "multiple of --save-interval 3"),
        (["--save", "s", "--keep-best", "loss"], "give --keep-last too"),
        (["--save", "s", "--keep-last", "1", "--keep-best", "eval/los"], "not a metric of this run; use one of loss,"),
        (["--save", "s", "--keep-last", "1", "--keep-best", "eval/loss"], "needs --valid-data"),
        (
            "--save s --keep-last 1 --keep-best eval/loss --valid-data v --save-interval 2".split(),
            r"multiple of --eval-interval \(not set\)",
        ),
    ],
)
def test_wrong_combinations(argv: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse([*REQUIRED, *argv])


def test_a_run_keeps_what_it_is_told_to(pool: WorkerPool, inputs: Inputs) -> None:
    """And resumes from it."""
    save = inputs.folder / "run"
    argv = flags(inputs.checkpoint, inputs.data, train_iters=5, save_interval=1, keep_last=1, valid_data=inputs.data)
    argv += ["--eval-interval", "1", "--keep-best", "eval/rewards/margins", "--async-save"]
    rows = run_and_read(pool, 2, argv, save)
    margins = {row["step"]: row["eval/rewards/margins"] for row in rows if row["step"] and "eval/loss" in row}
    assert complete_steps(save) == sorted({max(margins, key=lambda step: margins[step]), 5})
    assert latest_step(save) == 5
    run_and_read(pool, 2, [*argv, "--load", str(save), "--train-iters", "6"], save)
    assert latest_step(save) == 6 and len(complete_steps(save)) <= 2


def test_without_optimizer_state(pool: WorkerPool, inputs: Inputs) -> None:
    """A resume is refused while steps are left; weights can be taken, and an export can be made."""
    save, export = inputs.folder / "run", inputs.folder / "hf"
    argv = flags(inputs.checkpoint, inputs.data, train_iters=2)
    run_and_read(pool, 1, argv, inputs.folder / "whole")
    run_and_read(pool, 1, [*argv, "--no-save-optim"], save)
    sizes = [
        sum(path.stat().st_size for path in iteration_folder(run, 2).iterdir())
        for run in (inputs.folder / "whole", save)
    ]
    assert sizes[1] < sizes[0] / 2
    again = [*argv, "--load", str(save), "--save", str(save)]
    [message] = pool.run(1, train, [*again, "--train-iters", "3"])
    assert "was saved with --no-save-optim" in message and "--finetune" in message
    [(code, out, err)] = pool.run(1, run_main, [*again, "--no-save-optim", "--export-hf", str(export)])
    assert code == 0, err
    assert f"exported to {export}" in out
    other = [*argv, "--load", str(save), "--finetune"]
    assert [row["step"] for row in run_and_read(pool, 1, other, inputs.folder / "other")] == [1, 2]


def save_behind_a_gate(argv: list[str], root: Path, gate: Path) -> list[tuple[int | None, list[int]]]:
    """On a rank: an async save that waits for a named pipe; the tracker and the checkpoints at four moments."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from simpo_megatron.data import InMemoryPairs
    from simpo_megatron.trainer.checkpointing import CheckpointWriter
    from simpo_megatron.trainer.progress import Progress
    from tests.support.pairs import make_pairs
    from tests.support.steps import build_engine

    write = filesystem_async._write_item

    @functools.wraps(write)  # Megatron looks at the signature
    def wait_and_write(*args: Any, **kwargs: Any) -> Any:
        os.close(os.open(gate, os.O_RDONLY))  # returns once somebody holds the other end
        return write(*args, **kwargs)

    engine, _ = build_engine(argv)
    pairs: InMemoryPairs = make_pairs([(4, 3, 5), (6, 9, 1)])
    engine.train_step(engine.packer.pack(pairs, pairs.order(0, 2, 0)))
    writer, found = CheckpointWriter(engine), []

    def look() -> None:
        found.append((latest_step(root), complete_steps(root)))

    writer.save(root, Progress(step=1))
    filesystem_async._write_item = wait_and_write
    writer.drain()
    look()
    writer.save(root, replace(Progress(step=2), checkpoint="abc"))
    engine.train_step(engine.packer.pack(pairs, pairs.order(0, 2, 0)))
    writer.poll()
    look()
    handle = os.open(gate, os.O_RDWR)
    writer.drain()
    os.close(handle)
    filesystem_async._write_item = write
    look()
    return found


def test_async_save_moves_the_tracker_after_the_last_byte(pool: WorkerPool, inputs: Inputs) -> None:
    root, gate = inputs.folder / "run", inputs.folder / "gate"
    os.mkfifo(gate)
    argv = flags(inputs.checkpoint, inputs.data, save=root, async_save=True)
    for found in pool.run(2, save_behind_a_gate, argv, root, gate):
        assert found == [(1, [1]), (1, [1]), (2, [1, 2])]
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", "iter_0000002", TRACKER]
