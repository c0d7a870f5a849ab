"""Loss, metrics, gradients and gradient norm of adapters in every kind of layout, against transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simpo_megatron.adapters.lora import Lora
from tests.support.adapters import ATTENTION, LORA, merge, oracle, random_adapter, run_layout
from tests.support.distributed import LOCAL, NEWEST, WorkerPool
from tests.support.steps import CASES, one_thread, relative_error
from tests.support.tiny import EXPERTS, GLM, make_checkpoint

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
WHOLE = {"expert_tensor_parallel_size": 1}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SHARDED = {"use_distributed_optimizer": True}
MODELS: dict[str, tuple[str, dict[str, Any], Lora]] = {
    "llama": ("Llama", {}, LORA),
    "tied": ("Llama", {"tie_word_embeddings": True}, LORA),
    "attention": ("Qwen3", {"head_dim": 16}, ATTENTION),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, Lora(3, 5.0, rslora=True)),
    "mixtral": ("Mixtral", EXPERTS, LORA),
    "glm": ("Glm4Moe", GLM, ATTENTION),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 1.0, "pad_token_id": None},
        LORA,
    ),
}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one": ("llama", 1, {}),
    "recompute": ("llama", 1, FULL),
    "attention, one": ("attention", 1, {}),
    "attention, tp2 sp": ("attention", 2, SP),
    "biases, tp2": ("biases", 2, TP2),
    "tp2": ("llama", 2, TP2),
    "tp2 sp": ("llama", 2, {**SP, "head": "plain"}),
    "pp2, recompute": ("llama", 2, {**PP2, **FULL}),
    "cp2": ("llama", 2, CP2),
    "dp2, overlap": ("llama", 2, {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tied, vpp2": ("tied", 2, VPP),
    "norms behind the projections, tp2 sp": ("gemma2", 2, SP),
    "tp2 sp pp2": ("llama", 4, {**SP, **PP2, **SHARDED}),
    "experts, one": ("mixtral", 1, {}),
    "experts, ep2": ("mixtral", 2, EP2),
    "experts, tp2 sp": ("mixtral", 2, SP),
    "shared experts, tp2 sp": ("glm", 2, SP),
    "experts, tp2 sp whole": ("mixtral", 2, {**SP, **WHOLE, **SHARDED}),
    "experts, dp2, each over 2": ("mixtral", 2, {"expert_tensor_parallel_size": 2}),
    "experts, tp2 sp ep2": ("mixtral", 4, {**SP, **EP2, **SHARDED}),
}
Made = dict[str, tuple[Path, Path, dict[str, float], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """For every model its checkpoint, its adapter, and what the oracle gives."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    with one_thread():
        for name, (family, own, lora) in MODELS.items():
            checkpoint, adapter = make_checkpoint(folder / name, family, **own), folder / f"{name}-adapter"
            factors = random_adapter(checkpoint, adapter, lora)
            model = merge(checkpoint, factors, lora, folder / f"{name}-merged")
            found[name] = (checkpoint, adapter, *oracle(model, factors, lora, CASES["columns"]))
    return found


# Of Transformer Engine those that its own layers decide: the norm inside a layer, grouped experts, recomputation.
ENGINE = ("tp2 sp", "biases, tp2", "pp2, recompute", "experts, tp2 sp", "experts, tp2 sp whole")
RUNS = [
    *((LOCAL, name) for name in LAYOUTS),
    *(pytest.param(NEWEST, name, marks=pytest.mark.te) for name in ENGINE),
]


@pytest.mark.parametrize("pool, layout", RUNS, indirect=["pool"])
def test_loss_and_gradients(pool: WorkerPool, made: Made, layout: str) -> None:
    model, world, settings = LAYOUTS[layout]
    checkpoint, adapter, wanted, gradients = made[model]
    ranks = pool.run(world, run_layout, checkpoint, adapter, settings, "columns", None)
    for evaluated, trained, found, _ in ranks:
        del trained["learning_rate"]
        assert trained == pytest.approx(wanted, rel=1e-5, abs=2e-5)
        for name, value in evaluated.items():
            assert value == pytest.approx(wanted[name], rel=1e-5, abs=2e-5), name
        for name, gradient in found.items():
            assert relative_error(gradient, gradients[name]) < 3e-5, name
    assert set().union(*(rank[2] for rank in ranks)) == gradients.keys()
    assert all(torch.isfinite(tensor).all() for tensor in gradients.values())


def run_planted(fault: str, *args: Any) -> Any:
    """On a rank: `run_layout` with a fault of other trainers."""
    import pytest

    from simpo_megatron.adapters import install, layer

    with pytest.MonkeyPatch.context() as patch:
        if fault == "whole factors are not summed":
            patch.setattr(install, "_mark", lambda place, sequence_parallel: None)
        elif fault == "nothing requires a gradient":
            patch.setattr(install, "_require_grad", lambda module, inputs, output: output)
        elif fault == "factors of experts are not summed":
            patch.setattr(layer, "copy_to_tensor_model_parallel_region", lambda tensor, group: tensor)
        try:
            return run_layout(*args)
        except (AssertionError, RuntimeError):  # the ranks differ, or there is nothing to differentiate
            return None


PLANTED = {
    "whole factors are not summed": "tp2 sp",
    "nothing requires a gradient": "recompute",
    "factors of experts are not summed": "experts, dp2, each over 2",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_seen(pool: WorkerPool, made: Made, fault: str) -> None:
    model, world, settings = LAYOUTS[PLANTED[fault]]
    checkpoint, adapter, _, gradients = made[model]
    found, *_ = pool.run(world, run_planted, fault, checkpoint, adapter, settings, "columns", None)
    assert found is None or max(relative_error(found[2][name], gradients[name]) for name in found[2]) > 1e-3
