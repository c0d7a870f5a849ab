"""Loss, gradients, gradient norm, three steps and exports of adapters in every kind of layout, against transformers.

`test_peft.py` shows that PEFT computes the same with what is exported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.adapters import KINDS, WITH_EXPERTS, Oracle, factors_of, merge_weights, run_layout
from tests.support.checkpoints import tensors
from tests.support.distributed import LOCAL, NEWEST, WorkerPool
from tests.support.steps import relative_error

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
WHOLE = {"expert_tensor_parallel_size": 1}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SHARDED = {"use_distributed_optimizer": True}
# Five kinds of models on every axis, then what only some of them have.
GRID: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2 sp": (2, SP),
    "pp2": (2, PP2),
    "cp2": (2, CP2),
    "ep2": (2, EP2),
}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{
        f"{model}, {axis}": (model, *layout)
        for model in KINDS
        for axis, layout in GRID.items()
        # Megatron splits experts over tensor-parallel ranks with sequence parallelism alone.
        if axis != ("tp2" if model in WITH_EXPERTS else "ep2")
    },
    "plain head, tp2 sp": ("llama", 2, {**SP, "head": "plain"}),
    "pp2, recompute": ("llama", 2, {**PP2, **FULL}),
    "dp2, overlap": ("llama", 2, {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tied, vpp2": ("tied", 2, VPP),
    "attention, tp2 sp": ("attention", 2, SP),
    "biases, tp2": ("biases", 2, TP2),
    "norms behind the projections, tp2 sp": ("gemma2", 2, SP),
    "tp2 sp pp2": ("llama", 4, {**SP, **PP2, **SHARDED}),
    "shared experts, tp2 sp": ("glm", 2, SP),
    "whole experts, tp2 sp": ("qwen3_moe", 2, {**SP, **WHOLE, **SHARDED}),
    "experts, dp2, each over 2": ("mixtral", 2, {"expert_tensor_parallel_size": 2}),
    "experts, tp2 sp ep2": ("mixtral", 4, {**SP, **EP2, **SHARDED}),
}


# Of Transformer Engine those that its own layers decide: the norm inside a layer, grouped experts, recomputation.
ENGINE = ("llama, tp2 sp", "biases, tp2", "pp2, recompute", "qwen3, tp2 sp", "mixtral, tp2 sp", "whole experts, tp2 sp")
RUNS = [
    *((LOCAL, name) for name in LAYOUTS),
    *(pytest.param(NEWEST, name, marks=pytest.mark.te) for name in ENGINE),
]


@pytest.mark.parametrize("pool, layout", RUNS, indirect=["pool"])
def test_training_and_exports(pool: WorkerPool, oracles: dict[str, Oracle], layout: str, tmp_path: Path) -> None:
    model, world, settings = LAYOUTS[layout]
    oracle = oracles[model]
    ranks = pool.run(world, run_layout, oracle.checkpoint, oracle.folder, settings, tmp_path)
    for evaluated, trained, gradients, _ in ranks:
        del trained["learning_rate"]
        assert trained == pytest.approx(oracle.metrics, rel=1e-5, abs=2e-5)
        for name, value in evaluated.items():
            assert value == pytest.approx(oracle.metrics[name], rel=1e-5, abs=2e-5), name
        for name, gradient in gradients.items():
            assert relative_error(gradient, oracle.gradients[name]) < 3e-5, name
    assert set().union(*(rank[2] for rank in ranks)) == oracle.gradients.keys()

    factors = factors_of(tmp_path / "adapter")
    assert factors.keys() == oracle.stepped.keys()
    assert all(torch.equal(factors[name], tensor) for *_, held in ranks for name, tensor in held.items())
    for name, start in oracle.factors.items():
        assert relative_error(factors[name] - start, oracle.stepped[name] - start) < 1e-4, name
    merge_weights(oracle.checkpoint, factors, oracle.lora, tmp_path / "wanted")
    weights, merged = (tensors(tmp_path / folder) for folder in ("wanted", "merged"))
    assert weights.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)
