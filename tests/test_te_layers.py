"""What Transformer Engine's layers alone have: fused kernels, and a sliding window under context parallelism.

The oracle is that of `test_layouts.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.distributed import NEWEST, WorkerPool
from tests.support.families import GEMMA3
from tests.support.steps import CASES, build_engine, check_layout, command_line, one_thread, oracle, run_cases
from tests.support.tiny import EXPERTS, make_checkpoint
from tests.test_layouts import CP2, EP2, GEMMA, PP2, SP

pytestmark = pytest.mark.te
NO_PERMUTE = {"no_moe_permute_fusion": True}  # a Triton kernel


def run_with_fused_kernels(checkpoint: Path, layout: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """On a rank: `run_cases` with the kernels that a GPU turns on. Apex is absent."""
    from simpo_megatron.models import build, fusions  # `build` takes the name `on_gpu` when it is imported

    real = fusions.on_gpu
    assert build.on_gpu is real
    fusions.on_gpu = lambda: True
    try:
        engine, _ = build_engine(command_line(checkpoint, layout))
        assert engine.transformer.apply_rope_fusion and engine.transformer.gradient_accumulation_fusion
        return run_cases(checkpoint, layout, names)
    finally:
        fusions.on_gpu = real


@pytest.mark.parametrize("pool", [NEWEST], indirect=True)
@pytest.mark.parametrize(
    "model, world, layout",
    [
        (("Llama", {}), 1, {}),
        (("Llama", {}), 2, SP),
        (("Llama", {}), 2, {**CP2, "head": "plain"}),
        (("Gemma3", {**GEMMA, **GEMMA3, "tie_word_embeddings": True}), 2, PP2),
        (("Mixtral", EXPERTS), 2, {**EP2, **NO_PERMUTE}),
    ],
    ids=str,
)
def test_fused_rope_and_weight_gradients(
    pool: WorkerPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: tuple[str, dict[str, Any]],
    world: int,
    layout: dict[str, Any],
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", model[0], **model[1])
    with one_thread():
        whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        wanted = {"columns": oracle(whole, CASES["columns"])}
    run = pool.run
    monkeypatch.setattr(pool, "run", lambda w, _, *args: run(w, run_with_fused_kernels, *args))
    check_layout(pool, checkpoint, wanted, world, layout)


@pytest.mark.parametrize("pool", [NEWEST], indirect=True)
@pytest.mark.parametrize("kind", ["a2a", "all_gather"])
def test_a_sliding_window_under_context_parallelism(pool: WorkerPool, tmp_path: Path, kind: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "Gemma3", **GEMMA, **GEMMA3)  # in some of the layers
    with one_thread():
        whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        wanted = {"columns": oracle(whole, CASES["columns"])}
    check_layout(pool, checkpoint, wanted, 2, {**CP2, "cp_comm_type": kind})


@pytest.mark.parametrize("pool", [NEWEST], indirect=True)
def test_the_activation_of_experts_is_recomputed(pool: WorkerPool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "Mixtral", **EXPERTS)
    with one_thread():
        whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        wanted = {"columns": oracle(whole, CASES["columns"])}
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "moe_act"]}
    check_layout(pool, checkpoint, wanted, 2, {**EP2, **recomputed})
