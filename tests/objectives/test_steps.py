"""Every objective in a step: loss, metrics and all gradients on some layouts, against its formula in plain torch.

SimPO and SFT are compared on all layouts in `tests/test_layouts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from simpo_megatron.config.arguments import parse
from simpo_megatron.objectives import OBJECTIVES, Measured, PairScores
from tests.support.distributed import NEWEST, WorkerPool
from tests.support.formulas import FORMULAS, TERMS, Pair
from tests.support.steps import (
    NAN,
    OBJECTIVE_CASES,
    build_engine,
    command_line,
    gather_gradients,
    one_thread,
    oracle,
    relative_error,
)
from tests.support.tiny import make_checkpoint
from tests.test_layouts import CP2, PP2, SP


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


KTO_STEPS = ((0, 7, 1, 4), (5, 3, 6, 2))  # the pairs of two steps: the first gives the baseline of the second


@pytest.fixture(scope="module")
def oracles(checkpoint: Path) -> dict[str, Any]:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with one_thread():
        found = {name: oracle(model, case) for name, case in OBJECTIVE_CASES.items()}
        first, second = (replace(OBJECTIVE_CASES["kto"], indices=indices) for indices in KTO_STEPS)
        baseline = first.loss["kto_beta"] * oracle(model, first)[0]["kl_on_given_text"]
        assert baseline > 0.1
        found["kto, second step"] = oracle(model, replace(second, loss={**second.loss, "baseline": baseline}))
    return found


def run_objectives(checkpoint: Path, layout: dict[str, Any], names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """On a rank: metrics and gradients of some cases, all with one engine, because no weight changes."""
    engine, hf = build_engine(command_line(checkpoint, {"objective": "dpo", "lr": 1e-12, **layout}))
    found = {}

    def compute(pairs: Any, indices: Any) -> tuple[Any, Any]:
        metrics = engine.compute_gradients(engine.packer.pack(pairs, np.array(indices)))
        return metrics, {key: grad.clone() for key, grad in gather_gradients(engine, hf).items()}

    for name in names:
        case = OBJECTIVE_CASES[name]
        objective = parse(command_line(checkpoint, case.loss)).objective
        engine.config = replace(engine.config, objective=objective)
        found[name] = compute(case.pairs, case.indices)
    case = OBJECTIVE_CASES["kto"]
    engine.config = replace(engine.config, objective=parse(command_line(checkpoint, case.loss)).objective)
    engine.train_step(engine.packer.pack(case.pairs, np.array(KTO_STEPS[0])))
    found["kto, second step"] = compute(case.pairs, KTO_STEPS[1])
    return found


@pytest.mark.parametrize(
    "layout",
    [{**SP, "head_slab_bytes": "16KiB"}, {**CP2, "head": "plain"}, PP2, {}],
    ids=["tp2 sp, small slabs", "cp2, plain head", "pp2", "dp2"],
)
def test_step(pool: WorkerPool, checkpoint: Path, oracles: dict[str, Any], layout: dict[str, Any]) -> None:
    check_objectives(pool, checkpoint, oracles, layout)


@pytest.mark.parametrize("pool", [pytest.param(NEWEST, marks=pytest.mark.te)], indirect=True)
def test_step_under_transformer_engine(pool: WorkerPool, checkpoint: Path, oracles: dict[str, Any]) -> None:
    check_objectives(pool, checkpoint, {name: oracles[name] for name in ("dpo", "kto", "kto, second step")}, SP)


def check_objectives(pool: WorkerPool, checkpoint: Path, oracles: dict[str, Any], layout: dict[str, Any]) -> None:
    """Compares the cases that have an oracle on two ranks of a layout."""
    names = [name for name in oracles if name in OBJECTIVE_CASES]
    for found in pool.run(2, run_objectives, checkpoint, layout, names):
        for name, (wanted, wanted_gradients) in oracles.items():
            metrics, gradients = found[name]
            expected = {key: value for key, value in wanted.items() if key != "grad_norm"}
            assert metrics == pytest.approx(expected, rel=2e-5, abs=2e-5), name
            for key, gradient in gradients.items():
                assert relative_error(gradient, wanted_gradients[key]) < 2e-5, (name, key)


KINDS: dict[str, Any] = dict(OBJECTIVES)  # built with flags of their own


def test_every_objective_has_a_case() -> None:
    assert {case.loss["objective"] for case in OBJECTIVE_CASES.values()} | {"sft"} == set(OBJECTIVES)


def scores_of(count: int = 20) -> tuple[PairScores, torch.Tensor]:
    """Random scores in fp64, and their sums with gradient."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 90, (count, 2), generator=generator)
    sums, known = -lengths * 3 * torch.rand(2, count, 2, dtype=torch.float64, generator=generator)
    sums.requires_grad_()
    return PairScores(sums, lengths, torch.full((count,), NAN), torch.ones(count), known), sums


def formula_losses(settings: dict[str, Any], scores: PairScores) -> torch.Tensor:
    """The loss of every pair by the formula of the objective that the settings name."""
    known = scores.reference_sums_PM
    assert known is not None
    pairs = [
        Pair(*sums.unbind(), *map(int, lengths.tolist()), *map(float, reference.tolist()))
        for sums, lengths, reference in zip(scores.sums_PM, scores.lengths_PM, known, strict=True)
    ]
    return torch.stack([FORMULAS[settings["objective"]](pair, settings)[0] for pair in pairs])


@pytest.mark.parametrize("name, baseline", [*((name, 0.0) for name in TERMS), ("kto", 0.8)])
def test_pair_losses_and_slopes_in_fp64(checkpoint: Path, name: str, baseline: float) -> None:
    scores, sums = scores_of()
    settings = TERMS[name][2]
    objective = parse(command_line(checkpoint, settings)).objective.with_baseline(baseline)
    wanted = formula_losses({**settings, "baseline": baseline}, scores)
    found = objective.pair_losses(scores)
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    slopes = objective.pair_slopes(scores)
    (gradient,) = torch.autograd.grad(wanted.sum(), sums)
    assert slopes is not None and gradient.abs().max() > 0
    torch.testing.assert_close(slopes, gradient, rtol=1e-8, atol=1e-12)


def one_pair(chosen: int, rejected: int, ratio: float = 0.0) -> PairScores:
    """A pair of these lengths; the policy's log-ratio of the chosen response is `ratio`."""
    sums, known = torch.tensor([[-30.0 + ratio, -40.0]]).double(), torch.tensor([[-30.0, -40.0]]).double()
    nothing = torch.full((1,), NAN)
    return PairScores(sums, torch.tensor([[chosen, rejected]]), nothing, nothing, known)


def test_a_longer_chosen_response_is_pushed_less_by_rdpo() -> None:
    """The sign of alpha: with a minus it would be pushed more."""
    slope = {
        name: KINDS[name](**settings).pair_slopes(one_pair(30, 10))[0, 0].item()
        for name, settings in {"dpo": {"dpo_beta": 0.1}, "rdpo": {"rdpo_beta": 0.1, "rdpo_alpha": 0.05}}.items()
    }
    assert slope["dpo"] < slope["rdpo"] < 0


@pytest.mark.parametrize("name", [name for name, cls in KINDS.items() if cls.responses == 2])
def test_every_objective_raises_the_chosen_and_lowers_the_rejected_response(name: str) -> None:
    objective = KINDS[name]()
    scores = one_pair(10, 10, ratio=-20.0)  # the chosen response is the less likely one
    slopes = objective.pair_slopes(scores)
    assert slopes is not None and slopes[0, 0] < 0 < slopes[0, 1]


def test_kto_pushes_both_responses_apart_on_either_side_of_the_baseline() -> None:
    """The sign of the second term: with the one that some tables print, the rejected response would rise."""
    for baseline in (0.0, 3.0):
        objective = KINDS["kto"]().with_baseline(baseline)
        for ratio in (-20.0, 0.0, 20.0):
            slopes = objective.pair_slopes(one_pair(10, 10, ratio))
            assert slopes[0, 0] < 0 < slopes[0, 1]
    higher, lower = (KINDS["kto"]().with_baseline(value).pair_losses(one_pair(10, 10)).item() for value in (1.0, 0.0))
    assert higher == pytest.approx(1 - 1 / (1 + math.e) + 1 - 1 / (1 + math.exp(-1)))
    assert lower == 1.0, "a response that nothing changed has half of its weight as its loss"


def test_the_baseline_of_kto_is_never_negative() -> None:
    objective = KINDS["kto"](kto_beta=0.5)
    assert [objective.next_baseline({"kl_on_given_text": value}) for value in (-3.0, 4.0)] == [0.0, 2.0]


BY_LENGTH = {"ln-dpo", "ipo", "orpo", "rrhf", "rdpo"}  # the cases that read the lengths


@pytest.mark.parametrize("name", TERMS)
def test_planted_errors_are_seen(checkpoint: Path, name: str) -> None:
    """Swapped responses, the reference of another pair, and the length of the packed row as that of a response."""
    scores, _ = scores_of()
    objective = parse(command_line(checkpoint, TERMS[name][2])).objective
    wanted, known = formula_losses(TERMS[name][2], scores), scores.reference_sums_PM
    assert known is not None
    errors = {
        "swapped": replace(scores, sums_PM=scores.sums_PM.flip(1), reference_sums_PM=known.flip(1)),
        "other pair": replace(scores, reference_sums_PM=known.roll(1, 0)),
        "packed row": replace(scores, lengths_PM=torch.full_like(scores.lengths_PM, int(scores.lengths_PM.sum()))),
    }
    seen = {
        kind for kind, wrong in errors.items() if not torch.allclose(objective.pair_losses(wrong), wanted, rtol=1e-3)
    }
    other = {"other pair"} if objective.needs_reference else set()
    assert seen == {"swapped"} | other | ({"packed row"} if name in BY_LENGTH else set())


def test_orpo_has_the_odds_ratio_of_trl() -> None:
    trl = pytest.importorskip("trl.experimental.orpo")
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    scores, _ = scores_of()
    averages = scores.averages_PM.detach()
    term, *rewards, ratio, odds = trl.ORPOTrainer.odds_ratio_loss(trainer, *averages.unbind(1))
    objective = KINDS["orpo"](orpo_lambda=0.3)
    found = objective.pair_losses(scores).detach() + averages[:, 0]  # the other term is the NLL
    torch.testing.assert_close(found, -term.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.rewards(scores).detach(), torch.stack(rewards, dim=1).double())
    nothing = torch.zeros(())
    measured = Measured(scores, nothing, nothing, nothing, nothing)
    values = {metric.name: metric.value for metric in objective.metrics if metric.name.startswith("log_odds")}
    found = {name: value(measured).mean().item() for name, value in values.items()}
    wanted = {"log_odds_ratio": ratio.item(), "log_odds_chosen": odds.item()}
    assert found == pytest.approx(wanted, rel=1e-4)


def test_orpo_stays_finite_where_the_model_is_certain() -> None:
    nothing = torch.full((1,), NAN)
    scores = PairScores(torch.tensor([[0.0, -8.0]]), torch.tensor([[4, 4]]), nothing, nothing)
    objective = KINDS["orpo"]()
    assert torch.isfinite(objective.pair_losses(scores)).all() and torch.isfinite(objective.pair_slopes(scores)).all()
