"""Dropout of adapters: where it acts, against PEFT, and which masks the ranks draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo_megatron.errors import UserError
from tests.adapters.test_layouts import FULL, SP, TP2
from tests.support.adapters import gather_factors, random_adapter
from tests.support.distributed import BOTH, LOCAL, NEWEST, WorkerPool
from tests.support.steps import CASES, build_engine, command_line, one_thread, oracle_metrics, relative_error
from tests.support.tiny import EXPERTS, make_checkpoint

CASE = CASES["columns"]
SHARE = 0.3
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Positive(torch.nn.Module):
    """In the place of dropout of one half, a mask that follows from the input: the same in any layout."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x * (x > 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and an adapter with random factors."""
    folder = tmp_path_factory.mktemp("dropout")
    checkpoint = make_checkpoint(folder / "base", dtype=torch.float32)
    random_adapter(checkpoint, folder / "adapter")
    return checkpoint, folder / "adapter"


@pytest.fixture(scope="module")
def wanted(made: tuple[Path, Path]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of PEFT with the masks of `Positive`."""
    checkpoint, adapter = made
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Positive()
    with one_thread():
        loss, metrics = oracle_metrics(model, CASE)
        loss.backward()
    return metrics, {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradients_of(engine: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics of a batch in training, and the gradients of the factors."""
    metrics = engine.compute_gradients(engine.packer.pack(CASE.pairs, np.array(CASE.indices)))
    return metrics, gather_factors(engine, "main_grad")


def dropping(checkpoint: Path, adapter: Path, settings: dict[str, Any]) -> Any:
    """On a rank: an engine with dropout."""
    own = {"load_adapter": adapter, "lora_dropout": SHARE, "no_use_distributed_optimizer": True, **CASE.loss}
    return build_engine(command_line(checkpoint, {**own, **settings}))[0]


def run_positive(checkpoint: Path, adapter: Path, settings: dict[str, Any]) -> Any:
    """On a rank: what `wanted` has."""
    from simpo_megatron.adapters import layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "kept", lambda x, probability, stream: x > 0)
        return gradients_of(dropping(checkpoint, adapter, {**settings, "lora_dropout": 0.5}))


@pytest.mark.parametrize(
    "pool, settings",
    [(LOCAL, SP), (LOCAL, TP2), pytest.param(NEWEST, SP, marks=pytest.mark.te)],
    indirect=["pool"],
)
def test_it_acts_where_pefts_does(pool: WorkerPool, made: Any, wanted: Any, settings: dict[str, Any]) -> None:
    for metrics, gradients in pool.run(2, run_positive, *made, settings):
        assert {name: metrics[name] for name in wanted[0]} == pytest.approx(wanted[0], rel=1e-5, abs=2e-5)
        for name, gradient in gradients.items():
            assert relative_error(gradient, wanted[1][name]) < 2e-5, name


def run_alone(checkpoint: Path, adapter: Path) -> Any:
    """On a rank: gradients under several settings, what evaluations give, and the mean and spread of one layer."""
    from megatron.core.tensor_parallel import random

    from simpo_megatron.adapters.install import adapters, start_dropout

    batch, found, evaluated = (CASE.pairs, np.array(CASE.indices)), {}, {}
    for name, settings in {
        "dropout": {},
        "again": {},
        "recomputed": FULL,
        "other seed": {"seed": 5},
        "planted": FULL,
        "none": {"lora_dropout": 0},
        "without": {"lora_dropout": False},
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "planted":
                patch.setattr(random, "_set_all_rng_states", lambda *states: None)
            engine = dropping(checkpoint, adapter, settings)
            found[name] = gradients_of(engine)[1]
        evaluated[name] = engine.evaluate(engine.packer.pack(*batch))
    engine = dropping(checkpoint, adapter, {})
    layer = next(layer for layer in adapters(engine.models) if "q_proj" in layer.targets)
    [(_, columns), *_] = layer.entry.shapes
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    zero = x.new_zeros(3, sum(layer.entry.rows))
    draws = []
    with torch.no_grad():
        for position in range(400):
            start_dropout(engine.models, 0, position)
            draws.append(layer(x, zero))
        exact = layer.eval()(x, zero)
    return found, evaluated, torch.stack(draws), exact


@pytest.mark.parametrize("pool", BOTH, indirect=True)
def test_masks_are_drawn_again_by_recomputation_and_vanish_on_average(pool: WorkerPool, made: Any) -> None:
    [(found, evaluated, draws, exact)] = pool.run(1, run_alone, *made)

    def same(one: str, other: str) -> bool:
        return all(torch.equal(found[one][name], found[other][name]) for name in found[one])

    assert same("dropout", "again") and same("dropout", "recomputed") and same("none", "without")
    assert not same("dropout", "planted") and not same("dropout", "other seed") and not same("dropout", "none")
    assert all(metrics == evaluated["without"] for metrics in evaluated.values())
    spread = draws.std(dim=0)
    assert (spread > 0).all()
    assert ((draws.mean(dim=0) - exact).abs() < 5 * spread / len(draws) ** 0.5).all()


def run_masks(checkpoint: Path, settings: dict[str, Any], planted: bool) -> list[Tensor] | None:
    """On a rank: the masks of two steps in the order of drawing; None where the ranks' gradients differ."""
    from simpo_megatron.adapters import layer

    drawn, kept = [], layer.kept

    def recorded(x: Tensor, probability: float, stream: Any) -> Tensor:
        drawn.append(kept(x, probability, (torch.distributed.get_rank(),) if planted else stream))
        return drawn[-1]

    settings = {"lora_rank": 4, "lora_dropout": SHARE, "global_batch_size": len(CASE.indices), **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "kept", recorded)
        engine, _ = build_engine(command_line(checkpoint, settings))
        batch = engine.packer.pack(CASE.pairs, np.array(CASE.indices))
        for model in engine.models:  # B is zero, and with it the gradient of A
            for name, parameter in model.named_parameters():
                if "_b" in name and parameter.requires_grad:
                    parameter.data.fill_(0.1)
        if planted:
            engine.models[0].streams = {(torch.distributed.get_rank(),)}
        engine.compute_gradients(batch)
        try:
            gather_factors(engine, "main_grad")
        except AssertionError:
            return None
        engine.scheduler.step(increment=1)
        engine.compute_gradients(batch)
    return drawn


def test_ranks_with_the_same_input_draw_the_same_masks(pool: WorkerPool, made: Any, tmp_path: Path) -> None:
    experts = make_checkpoint(tmp_path / "mixtral", "Mixtral", torch.float32, **EXPERTS)
    over_two = {"expert_tensor_parallel_size": 2, "no_use_distributed_optimizer": True}
    for checkpoint, settings, shared in (
        (made[0], TP2, ("q", "k", "v", "gate", "up")),
        (made[0], SP, ()),
        (made[0], {"context_parallel_size": 2}, ()),
        (experts, {**over_two, "lora_targets": ["gate_proj", "up_proj", "down_proj"]}, ("gate", "up")),
    ):
        ranks = pool.run(2, run_masks, checkpoint, settings, False)
        one = ranks[0]
        assert len({mask.numpy().tobytes() for mask in one if mask.numel() > 64}) == sum(m.numel() > 64 for m in one)
        kept = sum(int(mask.sum()) for mask in one) / sum(mask.numel() for mask in one)
        assert kept == pytest.approx(1 - SHARE, abs=0.01)
        alike = [mine.shape == theirs.shape and torch.equal(mine, theirs) for mine, theirs in zip(*ranks, strict=True)]
        large = [index for index, mask in enumerate(one) if mask.numel() > 64]  # small ones may be alike by chance
        if checkpoint == experts:
            assert {alike[index] for index in large} == {True, False}
        else:
            assert [alike[index] for index in large] == [PROJECTIONS[index % 7] in shared for index in large]
    assert pool.run(2, run_masks, made[0], TP2, True)[0] is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_dropout": 1.0, "lora_rank": 4}, "--lora-dropout 1.0 must be at least 0 and less than 1"),
        ({"lora_dropout": 0.1}, "--lora-dropout 0.1 needs adapters; give --lora-rank or --load-adapter"),
    ],
)
def test_wrong_dropout_is_refused(settings: dict[str, Any], sentence: str) -> None:
    from simpo_megatron.config.adapter import AdapterConfig

    with pytest.raises(UserError) as raised:
        AdapterConfig(**settings)
    assert str(raised.value) == sentence
