"""`bench_head.py --objective`: every objective with two responses goes through the head. Times are not looked at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from simpo_megatron.objectives import OBJECTIVES
from tests.support.distributed import WorkerPool

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def compare(names: list[str]) -> dict[str, dict[str, Any]]:
    """On a rank: one repeat of a tiny problem."""
    sys.path.insert(0, str(TOOLS))
    try:
        import torch
        from head_peers import ObjectiveProblem, Shape
        from head_worker import MIB, compare_objectives
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel()
        problem = ObjectiveProblem(Shape.parse("2x4:32x256"), torch.float32, "cpu", 0)
        problem.slab_bytes = MIB
        problem.keep_main_grad()
        return compare_objectives(problem, names, repeats=1)
    finally:
        sys.path.remove(str(TOOLS))


def test_every_objective_is_measured(pool: WorkerPool) -> None:
    names = [name for name, cls in OBJECTIVES.items() if cls.responses == 2]
    (found,) = pool.run(1, compare, names)
    assert list(found) == names and found["simpo"]["ratio"] == 1
    assert all(row["milliseconds"] > 0 and row["ratio"] > 0 for row in found.values())
