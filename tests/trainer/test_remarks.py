"""Warnings about settings that are allowed but probably not meant."""

from __future__ import annotations

from typing import Any

import pytest

from simpo_megatron.config.arguments import parse
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.trainer.remarks import remarks
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, run_main

EPOCHS = {"train_iters": False, "train_epochs": 1}


@pytest.mark.parametrize(
    "settings, num_pairs, data_parallel, words",
    [
        ({}, 10, 1, None),
        ({"export_hf": False}, 10, 1, "neither --save nor --export-hf is set"),
        ({"global_batch_size": 128}, 3, 1, "exceeds the 3 training pairs: a step of 128 pairs is 42.7 epochs"),
        ({"global_batch_size": 128, **EPOCHS}, 72, 1, "exceeds the 72 training pairs: the whole run is one step of 72"),
        ({"global_batch_size": 128}, None, 1, None),
        ({}, 10, 16, "the data-parallel size 16 exceeds the 8 pairs of a step"),
        ({"profile_step_end": 20}, 10, 1, "--profile-step-end has no effect without --profile"),
        ({"profile_ranks": "1"}, 10, 1, "--profile-ranks has no effect without --profile or --record-memory-history"),
        ({"manual_gc_interval": 5, "manual_gc": True}, 10, 1, None),
        ({"manual_gc_interval": 5}, 10, 1, "--manual-gc-interval has no effect without --manual-gc"),
        ({"no_save_optim": True}, 10, 1, "--no-save-optim has no effect without --save"),
        ({"eval_interval": 2}, 10, 1, "--eval-interval has no effect without --valid-data"),
        ({"seq_length": 2048}, 10, 1, "--max-length 1024 (half of --seq-length unless set) exceeds the 512 positions"),
    ],
)
def test_each(inputs: Inputs, settings: dict[str, Any], num_pairs: int | None, data_parallel: int, words: str) -> None:
    values = {"export_hf": inputs.folder / "out", "lr": 1e-6, **settings}
    config = parse(flags(inputs.checkpoint, inputs.data, **values))
    found = remarks(config, read_hf_checkpoint(inputs.checkpoint), num_pairs, data_parallel)
    assert [words in line for line in found] == ([] if words is None else [True])


def test_a_run_and_a_dry_run_print_them(pool: WorkerPool, inputs: Inputs) -> None:
    argv = flags(inputs.checkpoint, inputs.data, train_iters=1, global_batch_size=16, seq_length=2048)
    for more in ([], ["--dry-run"]):
        [(code, stdout, _)] = pool.run(1, run_main, [*argv, *more])
        assert code == 0 and stdout.count("warning: ") == 3
        for words in ("neither --save", "exceeds the 10 training pairs", "exceeds the 512 positions"):
            assert stdout.count(words) == 1
