"""Five planted faults: each must turn the table red, in the row whose name says what is broken.

Without a fault these rows pass: `test_run.py` runs the whole program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import planted as mistakes
from tests.support.distributed import LOCAL, NEWEST, WorkerPool


def unmarked_norms() -> list[tuple[Any, str, Any]]:
    """Norms without the attribute `sequence_parallel`: Megatron does not sum their gradients over the ranks."""
    from simpo_megatron.trainer import setup

    build = setup.build_model

    def built(*args: Any, **options: Any) -> Any:
        models = build(*args, **options)
        for parameter in (parameter for model in models for parameter in model.parameters()):
            if parameter.ndim == 1 and hasattr(parameter, "sequence_parallel"):
                parameter.sequence_parallel = False
        return models

    return [(setup, "build_model", built)]


def wrong_shard() -> list[tuple[Any, str, Any]]:
    """A rank holds its neighbour's shard of one weight."""
    from simpo_megatron.trainer import setup

    load = setup.load_hf_weights

    def loaded(models: Any, *args: Any, **options: Any) -> None:
        from megatron.core import parallel_state

        load(models, *args, **options)
        group: Any = parallel_state.get_tensor_model_parallel_group()
        name = "decoder.layers.0.mlp.linear_fc2.weight"
        for weight in (weight for model in models for key, weight in model.named_parameters() if key == name):
            shards = [torch.empty_like(weight) for _ in range(group.size())]
            dist.all_gather(shards, weight.data, group=group)
            weight.data.copy_(shards[(group.rank() + 1) % group.size()])

    return [(setup, "load_hf_weights", loaded)]


def bf16_sum() -> list[tuple[Any, str, Any]]:
    """The head returns summed log-probs that were added up in bf16."""
    from simpo_megatron.head import layer

    score = layer.score_slabs

    def scored(*args: Any) -> Any:
        loss, sums_PM = score(*args)
        return loss, sums_PM.bfloat16().to(sums_PM.dtype)

    return [(layer, "score_slabs", scored)]


def stale_checkpoint() -> list[tuple[Any, str, Any]]:
    """A resume loads the weights of the step before."""
    from simpo_megatron.self_test import checkpoints

    folder = checkpoints.iteration_folder
    return [(checkpoints, "iteration_folder", lambda root, step: folder(root, step - 1))]


FAULTS = {
    "unmarked norm": unmarked_norms,
    "wrong shard": wrong_shard,
    "bf16 sum": bf16_sum,
    "stale checkpoint": stale_checkpoint,
}
# The row that must fail, and one that must not.
ROWS = {
    "unmarked norm": ("gradients: TP 2 + SP", "gradients: TP 2"),
    "wrong shard": ("gradients: TP 2", "gradients: CP 2"),
    "bf16 sum": ("head: sums and gradients, float32", "head: kernels"),
    "missing all-reduce": ("gradients: TP 2", "gradients: CP 2"),
    "stale checkpoint": ("checkpoint: resume: TP 2 + SP, then PP 2", "file system: --save"),
}


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Makes this process compute with the fault; None plants nothing."""
    if fault is None:
        yield
    elif fault == "missing all-reduce":
        with mistakes.planted("hidden gradient not reduced"):
            yield
    else:
        patch = pytest.MonkeyPatch()
        for owner, name, value in FAULTS[fault]():
            patch.setattr(owner, name, value)
        try:
            yield
        finally:
            patch.undo()


def run_named(names: tuple[str, ...], fault: str | None) -> dict[str, tuple[str, str]]:
    """On a rank: result and figure of the rows with these names."""
    from simpo_megatron.self_test.registry import all_rows
    from simpo_megatron.self_test.run import benches, run_rows

    with benches("cpu", None) as bench, planted(fault):
        rows = [row for row in all_rows(bench) if row.name in names]
        return {found.name: (found.outcome.result, found.outcome.figure) for found in run_rows(rows, bench)}


@pytest.mark.parametrize(
    "pool, fault",
    [
        *((LOCAL, fault) for fault in ROWS),
        *(pytest.param(NEWEST, fault, marks=pytest.mark.te) for fault in ROWS if fault != "bf16 sum"),
    ],
    indirect=["pool"],
)
def test_a_fault_turns_its_row_red(pool: WorkerPool, fault: str) -> None:
    red, green = ROWS[fault]
    if pool.kind != LOCAL:
        red = f"{red} (Transformer Engine)"
    for found in pool.run(2, run_named, (red, green), fault):
        assert found[green][0] == "proved", found
        result, figure = found[red]
        assert result == "FAILED"
        assert "Error" not in figure  # it was seen by its numbers, and did not crash
