"""`--deterministic-mode`: a run under it resumes bit for bit, and torch and Megatron are told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpo_megatron.checkpoint.folder import TRACKER
from simpo_megatron.trainer.environment import _DETERMINISTIC
from tests.support.distributed import WorkerPool
from tests.support.runs import flags, read_rows, run_main, without_speed
from tests.support.tiny import make_checkpoint, make_rows, write_rows


def train_deterministically(argv: list[str]) -> tuple[int, str, str, list[bool]]:
    """On a rank: how the program ended, and whether torch and Megatron were deterministic when the engine was built."""
    from simpo_megatron.trainer import loop

    seen, build = [], loop.build_engine

    def build_and_look(config: object, hf: object, transformer: object, steps: int) -> object:
        seen.append(torch.are_deterministic_algorithms_enabled() and transformer.deterministic_mode)  # type: ignore[attr-defined]
        return build(config, hf, transformer, steps)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        for name in _DETERMINISTIC:
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setattr(loop, "build_engine", build_and_look)
        try:
            return *run_main(argv), seen
        finally:
            torch.use_deterministic_algorithms(False)


def test_a_deterministic_run_resumes_bit_for_bit(pool: WorkerPool, tmp_path: Path) -> None:
    inputs = make_checkpoint(tmp_path / "model"), write_rows(tmp_path / "pairs.jsonl", make_rows(20))
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "share_prompts": True}
    argv = flags(*inputs, train_iters=4, save_interval=2, deterministic_mode=True, save=tmp_path / "run", **layout)
    outcomes = pool.run(2, train_deterministically, argv)
    assert [(code, seen) for code, _, _, seen in outcomes] == [(0, [True])] * 2, outcomes
    assert "deterministic: torch's algorithms, NCCL_ALGO Ring" in outcomes[0][1]
    whole = read_rows(tmp_path / "run")
    (tmp_path / "run" / TRACKER).write_text("2")
    outcomes = pool.run(2, train_deterministically, [*argv, "--load", str(tmp_path / "run")])
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    resumed = read_rows(tmp_path / "run")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    assert without_speed(resumed) == without_speed(whole)
