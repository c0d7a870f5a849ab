"""Megatron's balancing loss of the experts: its gradient is Megatron's formula, whatever the pairs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.distributed import WorkerPool
from tests.support.families import on_disk
from tests.support.steps import CASES, build_engine, command_line, gather_gradients, relative_error
from tests.support.tiny import EXPERTS, make_checkpoint
from tests.test_layouts import CP2, EP2, FULL, PP2, SP, WHOLE

COEFFICIENT = 0.3
ALL = CASES["sigmoid"].indices


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "Mixtral", num_hidden_layers=2, **EXPERTS)


def step_gradients(
    checkpoint: Path, settings: dict[str, Any], indices: tuple[int, ...]
) -> tuple[float, dict[str, torch.Tensor]]:
    """On a rank: the reported loss and the gradients of one step over pairs that make one row."""
    case = CASES["sigmoid"]
    argv = command_line(checkpoint, {**case.loss, "seq_length": 512, "no_use_distributed_optimizer": True, **settings})
    engine, hf = build_engine(argv)
    batch = engine.packer.pack(case.pairs, np.array(indices))
    assert batch.counts.packed_rows == 1
    metrics = engine.train_step(batch)
    return metrics["loss"], gather_gradients(engine, hf)


def balancing_gradients(checkpoint: Path, indices: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The gradient of Megatron's formula by transformers: E * sum_e f_e P_e for every layer, over all tokens.

    f_e is the share of the tokens that choose expert e, P_e its mean probability.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    pairs = CASES["sigmoid"].pairs
    by_layer: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for i in indices:
        prompt, *responses = pairs.pair(i)
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
    "world, layout, indices",
    [
        (1, {}, ALL),
        (2, {**CP2, **EP2}, ALL),
        (2, {**SP, **EP2, **WHOLE}, ALL),
        (4, {**SP, **PP2}, ALL),
        # One pair for two data-parallel ranks: the empty row does not count.
        (2, EP2, (1,)),
        (2, {**EP2, **FULL}, (1,)),
        (4, {**EP2, **PP2}, (1,)),
    ],
    ids=str,
)
def test_the_balancing_loss_is_not_scaled_by_the_pairs(
    pool: WorkerPool, checkpoint: Path, world: int, layout: dict[str, Any], indices: tuple[int, ...]
) -> None:
    without = pool.run(world, step_gradients, checkpoint, layout, indices)
    balanced = pool.run(world, step_gradients, checkpoint, {**layout, "moe_aux_loss_coeff": COEFFICIENT}, indices)
    wanted = balancing_gradients(checkpoint, indices)
    compared = set()
    for (plain_loss, plain), (loss, both) in zip(without, balanced, strict=True):
        assert loss == pytest.approx(plain_loss)  # it is no part of the reported loss
        for name in plain.keys() & wanted.keys():
            assert relative_error(both[name] - plain[name], wanted[name]) < 1e-3, name
            compared.add(name)
    assert any("gate.weight" in name for name in compared) and "model.embed_tokens.weight" in compared
