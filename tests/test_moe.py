"""Megatron's load-balancing loss beside the pair loss: its gradient is Megatron's formula, whatever the pairs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import on_disk
from tests.steps import CASES, build_engine, command_line, gather_gradients, relative_error
from tests.test_layouts import CP2, EP2, PP2, SP, WHOLE
from tests.tiny import EXPERTS, make_checkpoint

COEFFICIENT = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "Mixtral", num_hidden_layers=2, **EXPERTS)


def step_gradients(checkpoint: Path, settings: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """On a rank: the reported loss and the gradients of one step over all pairs in one row."""
    case = CASES["sigmoid"]
    argv = command_line(checkpoint, {**case.loss, "seq_length": 512, "no_use_distributed_optimizer": True, **settings})
    engine, hf = build_engine(argv)
    metrics = engine.train_step(engine.plan(case.pair_store, np.array(case.pairs)))
    return metrics["loss"], gather_gradients(engine, hf)


def balancing_gradients(checkpoint: Path) -> dict[str, torch.Tensor]:
    """E * sum_e f_e P_e of every layer over the tokens of all sequences: f by the chosen experts, P by the softmax."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    store, case = CASES["sigmoid"].pair_store, CASES["sigmoid"]
    by_layer: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for i in case.pairs:
        prompt, *responses = store.pair(i)
        for response in responses:
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
            for found, logits in zip(by_layer, model(ids, output_router_logits=True).router_logits, strict=True):
                found.append(logits)
    experts, topk = EXPERTS["num_local_experts"], EXPERTS["num_experts_per_tok"]
    loss = torch.zeros(())
    for logits in map(torch.cat, by_layer):
        chosen = torch.zeros_like(logits).scatter_(1, logits.topk(topk).indices, 1.0)
        loss = loss + experts * (chosen.mean(0) / topk * logits.softmax(-1).mean(0)).sum()
    (COEFFICIENT * loss).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return on_disk(model, gradients)


@pytest.mark.parametrize(
    "world, layout", [(1, {}), (2, {**CP2, **EP2}), (2, {**SP, **EP2, **WHOLE}), (4, {**SP, **PP2})], ids=str
)
def test_the_balancing_loss_is_not_scaled_by_the_pairs(pool, checkpoint, world: int, layout: dict[str, Any]) -> None:
    without = pool.run(world, step_gradients, checkpoint, layout)
    balanced = pool.run(world, step_gradients, checkpoint, {**layout, "moe_aux_loss_coeff": COEFFICIENT})
    wanted = balancing_gradients(checkpoint)
    compared = set()
    for (plain_loss, plain), (loss, both) in zip(without, balanced, strict=True):
        assert loss == pytest.approx(plain_loss)  # it is no part of the reported loss
        for name in plain.keys() & wanted.keys():
            assert relative_error(both[name] - plain[name], wanted[name]) < 1e-3, name
            compared.add(name)
    assert any("gate.weight" in name for name in compared) and "model.embed_tokens.weight" in compared


def test_an_empty_pack_does_not_break_the_balancing_loss(pool, checkpoint) -> None:
    """One row for two data-parallel ranks."""
    for loss, gradients in pool.run(2, step_gradients, checkpoint, {**EP2, "moe_aux_loss_coeff": COEFFICIENT}):
        assert torch.isfinite(torch.tensor(loss))
        assert all(gradient.isfinite().all() for gradient in gradients.values())
