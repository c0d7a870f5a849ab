"""An adapter and its optimizer state, saved in one layout and loaded in another: every number keeps its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from simpo_megatron.checkpoint.folder import iteration_folder
from tests.adapters.test_layouts import CP2, EP2, PP2, SP, TP2, VPP, WHOLE
from tests.support.adapters import Oracle, build_adapted
from tests.support.distributed import LOCAL, NEWEST, WorkerPool


def save_in(checkpoint: Path, adapter: Path, layout: dict[str, Any], load: Path | None, save: Path) -> None:
    """On a rank: trains two steps, or loads a checkpoint; then saves one."""
    from simpo_megatron.trainer import loading
    from simpo_megatron.trainer.checkpointing import CheckpointWriter
    from simpo_megatron.trainer.progress import Progress

    settings = {**layout, "use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
    engine, _, batch = build_adapted(checkpoint, adapter, settings)
    if load is None:
        engine.train_step(batch)
        engine.train_step(batch)
    else:
        loading.load(engine, iteration_folder(load, 2))
    CheckpointWriter(engine).save(save, Progress(step=2))


def read_all(root: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its path in the state, by torch's own reader."""
    state: dict[str, Any] = {}
    reader = FileSystemReader(iteration_folder(root, 2))
    _load_state_dict(state, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    found, left = dict[str, Tensor](), [("", state)]
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{path}.{key}", item) for key, item in value.items()]
        elif isinstance(value, Tensor):
            found[path] = value
    return found


EXPERTS = ("qwen3_moe", {**SP, **EP2, **WHOLE}, [{}, EP2, PP2])


@pytest.mark.parametrize(
    "pool, model, before, after",
    [
        (LOCAL, "llama", SP, [{}, PP2, CP2]),
        (LOCAL, "tied", VPP, [TP2]),
        (LOCAL, *EXPERTS),
        pytest.param(NEWEST, *EXPERTS, marks=pytest.mark.te),
    ],
    indirect=["pool"],
)
def test_every_number_keeps_its_bits(
    pool: WorkerPool,
    oracles: dict[str, Oracle],
    model: str,
    before: dict[str, Any],
    after: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    of = oracles[model].checkpoint, oracles[model].folder
    pool.run(2, save_in, *of, before, None, tmp_path / "first")
    first = read_all(tmp_path / "first")
    assert len(first) == 4 * len(oracles[model].factors)  # the factors, the optimizer's copy, and two moments
    assert all(tensor.any() for tensor in first.values())
    for index, layout in enumerate(after):
        pool.run(2 if layout else 1, save_in, *of, layout, tmp_path / "first", tmp_path / str(index))
        again = read_all(tmp_path / str(index))
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
