"""Loss, gradients, gradient norm, three steps and exports of adapters in every kind of layout, against transformers.

`test_peft.py` shows that PEFT computes the same with what is exported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simpo_megatron.adapters.lora import Lora
from simpo_megatron.adapters.peft_folder import PREFIX, WEIGHTS
from tests.support.adapters import ATTENTION, LORA, merge, random_adapter, run_layout, trained_oracle
from tests.support.checkpoints import tensors
from tests.support.distributed import LOCAL, NEWEST, WorkerPool
from tests.support.families import QWEN3_EXPERTS
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
    "qwen3_moe": ("Qwen3Moe", QWEN3_EXPERTS, LORA),
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
    "experts, tp2 sp whole": ("qwen3_moe", 2, {**SP, **WHOLE, **SHARDED}),
    "experts, dp2, each over 2": ("mixtral", 2, {"expert_tensor_parallel_size": 2}),
    "experts, tp2 sp ep2": ("mixtral", 4, {**SP, **EP2, **SHARDED}),
}
Made = dict[str, tuple[Path, Path, Lora, dict[str, float], dict[str, Tensor], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """For every model its checkpoint, its adapter, and what the oracle gives."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    with one_thread():
        for name, (family, own, lora) in MODELS.items():
            checkpoint, adapter = make_checkpoint(folder / name, family, **own), folder / f"{name}-adapter"
            factors = random_adapter(checkpoint, adapter, lora)
            steps = trained_oracle(checkpoint, factors, lora, CASES["columns"], folder / f"{name}-steps")
            found[name] = (checkpoint, adapter, lora, *steps)
    return found


# Of Transformer Engine those that its own layers decide: the norm inside a layer, grouped experts, recomputation.
ENGINE = ("tp2 sp", "biases, tp2", "pp2, recompute", "experts, tp2 sp", "experts, tp2 sp whole")
RUNS = [
    *((LOCAL, name) for name in LAYOUTS),
    *(pytest.param(NEWEST, name, marks=pytest.mark.te) for name in ENGINE),
]


@pytest.mark.parametrize("pool, layout", RUNS, indirect=["pool"])
def test_training_and_exports(pool: WorkerPool, made: Made, layout: str, tmp_path: Path) -> None:
    model, world, settings = LAYOUTS[layout]
    checkpoint, adapter, lora, wanted, gradients, stepped = made[model]
    ranks = pool.run(world, run_layout, checkpoint, adapter, settings, "columns", tmp_path)
    for evaluated, trained, found, _ in ranks:
        del trained["learning_rate"]
        assert trained == pytest.approx(wanted, rel=1e-5, abs=2e-5)
        for name, value in evaluated.items():
            assert value == pytest.approx(wanted[name], rel=1e-5, abs=2e-5), name
        for name, gradient in found.items():
            assert relative_error(gradient, gradients[name]) < 3e-5, name
    assert set().union(*(rank[2] for rank in ranks)) == gradients.keys()
    assert all(torch.isfinite(tensor).all() for tensor in gradients.values())

    start = factors_of(adapter)
    factors = factors_of(tmp_path / "adapter")
    assert factors.keys() == stepped.keys()
    assert all(torch.equal(factors[name], tensor) for *_, held in ranks for name, tensor in held.items())
    for name, tensor in factors.items():
        assert relative_error(tensor - start[name], stepped[name] - start[name]) < 1e-3, name
    merge(checkpoint, factors, lora, tmp_path / "wanted")
    weights, merged = (tensors(tmp_path / folder) for folder in ("wanted", "merged"))
    assert weights.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)


def factors_of(folder: Path) -> dict[str, Tensor]:
    """The factors in a PEFT folder, by their names in the weight table."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}


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
def test_a_planted_fault_is_seen(pool: WorkerPool, made: Made, fault: str, tmp_path: Path) -> None:
    model, world, settings = LAYOUTS[PLANTED[fault]]
    checkpoint, adapter, _, _, gradients, _ = made[model]
    found, *_ = pool.run(world, run_planted, fault, checkpoint, adapter, settings, "columns", tmp_path)
    assert found is None or max(relative_error(found[2][name], gradients[name]) for name in found[2]) > 1e-3
