"""Optimizer steps against torch's AdamW, and numbers that are not finite. The gradients are in `test_layouts.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from simpo_megatron.errors import UserError
from simpo_megatron.step import PreferenceStep
from tests.support.distributed import Collectives, WorkerPool
from tests.support.pairs import make_pairs
from tests.support.steps import CASES, LENGTHS, NAN, build_engine, command_line, one_thread, oracle, oracle_metrics
from tests.support.tiny import make_checkpoint
from tests.test_layouts import CP2, PP2, SP, TP2, VPP


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


TRAINING = {"lr": 3e-3, "lr_decay_style": "constant", "lr_warmup_fraction": 0, "weight_decay": 0.1, "clip_grad": 0.5}
DISTRIBUTED: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp4, overlap": (4, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2 pp2": (4, {**TP2, **PP2}),
    "tp2 sp dp2": (4, SP),
    "vpp2 dp2, overlap": (4, {**VPP, "overlap_grad_reduce": True, "overlap_param_gather": True}),
}


def two_steps(checkpoint: Path, layout: dict[str, Any]) -> list[dict[str, float]]:
    """On a rank: metrics of two optimizer steps, and of the evaluation after them."""
    case = CASES["columns"]
    engine, _ = build_engine(command_line(checkpoint, {**TRAINING, **layout, **case.loss}))
    batch = engine.packer.pack(case.pairs, np.array(case.indices))
    found = [engine.train_step(batch), engine.train_step(batch)]
    engine.sync_parameters()
    return [*found, engine.evaluate(batch)]


@pytest.fixture(scope="module")
def two_oracle_steps(checkpoint: Path) -> list[dict[str, float]]:
    """The same steps with torch's clipping and AdamW, without weight decay of norms."""
    model, case = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), CASES["columns"]
    norms, matrices = [], []
    for parameter in model.parameters():
        (norms if parameter.ndim == 1 else matrices).append(parameter)
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": TRAINING["weight_decay"]}, {"params": norms, "weight_decay": 0.0}],
        lr=TRAINING["lr"],
    )
    found = []
    with one_thread():
        for _ in range(2):
            metrics, _ = oracle(model, case)
            torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING["clip_grad"])
            adam.step()
            found.append({**metrics, "learning_rate": TRAINING["lr"]})
        found.append(oracle_metrics(model, case)[1])
    return found


@pytest.mark.parametrize("world, layout", DISTRIBUTED.values(), ids=DISTRIBUTED)
def test_steps_of_the_distributed_optimizer(
    pool: WorkerPool, checkpoint: Path, two_oracle_steps: list[dict[str, float]], world: int, layout: dict[str, Any]
) -> None:
    first, second, after = two_oracle_steps
    assert after["loss"] < second["loss"] < first["loss"] and first["grad_norm"] > TRAINING["clip_grad"]
    for found in pool.run(world, two_steps, checkpoint, layout):
        assert found[0] == pytest.approx(first, rel=1e-5, abs=2e-5)
        assert found[1] == pytest.approx(second, rel=1e-4, abs=1e-4)
        assert found[2] == pytest.approx(after, rel=1e-4, abs=1e-4)


def fail_step(checkpoint: Path, layout: dict[str, Any], weight: float) -> tuple[str, bool]:
    """On a rank: the error of a step on pairs of this weight, and whether every parameter kept its bits."""
    engine, _ = build_engine(command_line(checkpoint, layout))
    before = [parameter.detach().clone() for model in engine.models for parameter in model.parameters()]
    pairs = make_pairs(LENGTHS, vocab_size=270, weight=[1, 1, 1, weight, 1, 1, 1, 1])
    with pytest.raises(UserError) as raised:
        engine.train_step(engine.packer.pack(pairs, np.arange(len(LENGTHS))))
    after = [parameter for model in engine.models for parameter in model.parameters()]
    return str(raised.value), all(map(torch.equal, before, after))


@pytest.mark.parametrize("world, layout", [(1, {"clip_grad": 1.0}), (4, {**TP2, **PP2})], ids=str)
@pytest.mark.parametrize(
    "weight, words", [(NAN, "the loss is nan"), (math.inf, "the loss is inf"), (1e38, "the gradient norm is")]
)
def test_a_number_that_is_not_finite_changes_nothing(
    pool: WorkerPool, checkpoint: Path, world: int, layout: dict[str, Any], weight: float, words: str
) -> None:
    for message, unchanged in pool.run(world, fail_step, checkpoint, layout, weight):
        assert words in message and "no weight was changed" in message
        assert unchanged


def loss_collectives(checkpoint: Path, layout: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """On a rank: the collectives of `loss_func` without the fused head, and of its backward pass."""
    case = CASES["sigmoid"]
    engine, hf = build_engine(command_line(checkpoint, {**layout, **case.loss, "head": "plain"}))
    batch = next(engine.packer.microbatches(engine.packer.pack(case.pairs, np.array(case.indices))))
    columns = engine.models[0].output_layer.weight.shape[0]
    logits = torch.randn(1, batch.tokens.shape[1], columns, requires_grad=True)
    step = PreferenceStep(engine.config.objective, hf.architecture.vocab_size, 1)
    with Collectives() as forward:
        loss, _ = step.loss_func(batch, False, logits)
    with Collectives() as backward:
        loss.backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize(
    "world, layout, expected",
    [
        (1, {}, {}),
        (2, TP2, {"allgather_base": 1}),
        (2, CP2, {"allreduce": 1}),
        (4, {**TP2, **CP2}, {"allgather_base": 1, "allreduce": 1}),
    ],
    ids=str,
)
def test_collectives_of_a_microbatch_are_those_of_the_docstring(
    pool: WorkerPool, checkpoint: Path, world: int, layout: dict[str, Any], expected: dict[str, int]
) -> None:
    assert pool.run(world, loss_collectives, checkpoint, layout) == [(expected, {})] * world
