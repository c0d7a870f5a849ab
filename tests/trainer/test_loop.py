"""The run around the engine: what it refuses, how far it goes, and that all ranks stop together."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo_megatron.checkpoint.folder import TRACKER
from tests.support.distributed import WorkerPool
from tests.support.runs import flags, read_rows, run_and_read, train
from tests.support.tiny import make_checkpoint, make_rows, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_checkpoint(folder / "model"), write_rows(folder / "pairs.jsonl", make_rows(20))


def test_token_ids_outside_the_vocabulary(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    small = make_checkpoint(tmp_path / "small", vocab_size=280)
    [message] = pool.run(1, train, flags(small, inputs[1], save=tmp_path / "run"))
    assert "gives token id" in message and "vocab_size is 280" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    argv = flags(*inputs, train_iters=1)
    rows = run_and_read(pool, 1, argv, tmp_path / "run")
    [message] = pool.run(1, train, [*argv, "--save", str(tmp_path / "run")])
    assert f"--save {tmp_path / 'run'} holds another run; resume it with --load" in message
    assert read_rows(tmp_path / "run") == rows


def test_what_rank_0_cannot_write_stops_every_rank(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    argv = flags(*inputs, save=tmp_path / "run", tensor_model_parallel_size=2)
    messages = pool.run(2, train, argv)
    assert messages[0] == messages[1] and "metrics.jsonl" in messages[0]


def test_epochs_end_with_their_last_pair_whatever_the_batch(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = flags(*inputs, train_epochs=1)
    del argv[argv.index("--train-iters") : argv.index("--train-iters") + 2]
    rows = run_and_read(pool, 1, argv, run)  # 20 pairs in steps of 8
    assert [row["epoch"] for row in rows] == pytest.approx([0.4, 0.8, 1.0])
    smaller = [*argv, "--load", str(run), "--save", str(run), "--global-batch-size", "4"]
    [message] = pool.run(1, train, smaller)
    assert "has ended, and this command differs from it (resumed with global_batch_size 4, was 8)" in message
    assert len(read_rows(run)) == 3, "nothing was left to train"
    assert (run / TRACKER).read_text() == "3"


def test_a_run_shorter_than_its_warm_up_still_learns(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    [row] = run_and_read(pool, 1, flags(*inputs, train_iters=1), tmp_path / "run")
    assert row["learning_rate"] == pytest.approx(1e-3)


def test_other_pairs_of_the_same_number_are_noticed(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run_and_read(pool, 1, flags(*inputs, train_iters=1), tmp_path / "run")
    other = write_rows(tmp_path / "other.jsonl", make_rows(20, seed=1))
    [message] = pool.run(1, train, [*flags(inputs[0], other), "--load", str(tmp_path / "run")])
    assert "the checksum of the training data was" in message


def test_the_optimizers_checkpoints_do_not_mix(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run_and_read(pool, 1, flags(*inputs, train_iters=1), tmp_path / "run")
    argv = [*flags(*inputs), "--load", str(tmp_path / "run"), "--no-use-distributed-optimizer"]
    [message] = pool.run(1, train, argv)
    assert "saved with --use-distributed-optimizer, not --no-use-distributed-optimizer; resume with the same" in message


def test_recomputed_blocks_must_divide_a_stage(pool: WorkerPool, inputs: tuple[Path, Path]) -> None:
    argv = flags(*inputs, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=3)
    [message] = pool.run(1, train, argv)
    assert "--recompute-num-layers 3 does not divide the 4 layers" in message


def test_evaluations_stand_before_between_and_after(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    argv = flags(*inputs, valid_data=inputs[1], train_iters=4, eval_interval=2)
    rows = run_and_read(pool, 1, argv, tmp_path / "run")
    kinds = [(row["step"], "eval/loss" in row) for row in rows]
    assert kinds == [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
