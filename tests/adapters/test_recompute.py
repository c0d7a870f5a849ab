"""Recomputation changes no gradient of an adapter, although the frozen embedding below it requires none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.test_layouts import FULL
from tests.support.adapters import KINDS, WITH_EXPERTS, Oracle, build_adapted, gather_factors
from tests.support.distributed import BOTH, WorkerPool
from tests.support.steps import relative_error

SELECTIVE = {"recompute_granularity": "selective"}


def gradients_under(checkpoint: Path, adapter: Path, settings: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """On a rank: the gradients of the factors under each of these settings."""
    found = []
    for one in settings:
        engine, _, batch = build_adapted(checkpoint, adapter, one)
        engine.compute_gradients(batch)
        found.append(gather_factors(engine, "main_grad"))
    return found


@pytest.mark.parametrize("pool", BOTH, indirect=True)
@pytest.mark.parametrize("model", KINDS)
def test_gradients_are_the_same(pool: WorkerPool, oracles: dict[str, Oracle], model: str) -> None:
    oracle, block = oracles[model], "moe" if model in WITH_EXPERTS else "mlp"
    parts = {**SELECTIVE, "recompute_modules": ["core_attn", block]}
    [found] = pool.run(1, gradients_under, oracle.checkpoint, oracle.folder, [{}, FULL, SELECTIVE, parts])
    kept, *recomputed = found
    assert all(gradient.any() for gradient in kept.values())
    for gradients in recomputed:
        assert all(torch.equal(gradients[name], gradient) for name, gradient in kept.items())


def test_a_recomputed_norm_gives_the_same_up_to_rounding(pool: WorkerPool, oracles: dict[str, Oracle]) -> None:
    """Megatron then sums the gradient of the norm in another order, also without adapters."""
    norms = {**SELECTIVE, "recompute_modules": ["layernorm"]}
    for model in ("qwen3", "qwen3_moe"):
        [found] = pool.run(1, gradients_under, oracles[model].checkpoint, oracles[model].folder, [{}, norms])
        assert all(relative_error(found[1][name], gradient) < 1e-5 for name, gradient in found[0].items())
