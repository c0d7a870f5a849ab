"""A new objective is a class and a line in the registry: parser, step, both heads, trainer and verifier take it as it is.

The objective of this test is CPO's (arXiv 2401.08417): -log sigmoid(beta * (sum of the chosen log-probs - sum of the rejected
ones)) with an NLL term. It has its own flags, works on sums, and sets no margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from simpo_megatron.config.arguments import build_parser, flat, parse
from simpo_megatron.errors import UserError
from simpo_megatron.objectives import OBJECTIVES, Objective, PairScores
from simpo_megatron.settings import setting
from tests.support.families import on_disk
from tests.support.steps import (
    CASES,
    build_engine,
    command_line,
    gather_gradients,
    member_logps,
    one_thread,
    relative_error,
)
from tests.support.tiny import make_checkpoint
from tests.test_layouts import CP2, PP2, TP2


@dataclass(frozen=True)
class CPO(Objective):
    """CPO"""

    name: ClassVar[str] = "cpo"
    cpo_beta: float = setting(0.1, "scale of the rewards")
    cpo_lambda: float = setting(1.0, "weight of the NLL")

    @property
    def nll_weight(self) -> float:
        return self.cpo_lambda

    def pair_losses(self, scores: PairScores) -> torch.Tensor:
        rewards_PM = self.rewards(scores)
        return -F.logsigmoid(rewards_PM[:, 0] - rewards_PM[:, 1])

    def rewards(self, scores: PairScores) -> torch.Tensor:
        return self.cpo_beta * scores.sums_PM

    def describe(self) -> str:
        return f"CPO: beta {self.cpo_beta:g}"


SETTINGS = {"objective": "cpo", "cpo_beta": 0.05, "cpo_lambda": 0.4}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, CPO.name, CPO)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def test_its_flags_are_there(registered: None, checkpoint: Path) -> None:
    config = parse(command_line(checkpoint, SETTINGS))
    assert config.objective == CPO(cpo_beta=0.05, cpo_lambda=0.4)
    assert "--cpo-lambda" in build_parser().format_help()
    assert {name: flat(config)[name] for name in SETTINGS} == SETTINGS


def test_an_unknown_objective_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("objective: cpo\n")
    with pytest.raises(UserError, match="--objective cpo is not known; use simpo or sft"):
        parse([*command_line(checkpoint, {}), "--config", str(tmp_path / "run.yaml")])


def run_cpo(checkpoint: Path, layout: dict[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor], np.ndarray]:
    """On a rank: metrics and gradients of the global batch, and the scores of the whole set."""
    from simpo_megatron.trainer.scoring import score_pairs

    OBJECTIVES[CPO.name] = CPO
    try:
        engine, hf = build_engine(command_line(checkpoint, {**SETTINGS, **layout}))
    finally:
        del OBJECTIVES[CPO.name]
    case = CASES["columns"]
    metrics = engine.compute_gradients(engine.packer.pack(case.pairs_in_memory, np.array(case.pairs)))
    gradients = {name: gradient.clone() for name, gradient in gather_gradients(engine, hf).items()}
    return metrics, gradients, score_pairs(engine, case.pairs_in_memory)


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and summed log-probs by transformers and the formula written out."""
    model, case = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), CASES["columns"]
    pairs = case.pairs_in_memory
    with one_thread():
        every = [
            [member_logps(model, p, response) for response in both] for p, *both in map(pairs.pair, range(len(pairs)))
        ]
        sums = torch.stack([torch.stack([logps.sum() for logps in both]) for both in every])
        chosen, rejected = sums.unbind(1)
        weight = torch.from_numpy(pairs.columns["weight"]).double()
        losses = weight * F.softplus(-0.05 * (chosen - rejected))
        loss = losses.mean() - 0.4 * chosen.sum() / sum(len(both[0]) for both in every)
        loss.backward()
    gradients = on_disk(model, {name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    return loss.item(), gradients, sums.detach()


@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (1, {"head": "plain"}), (2, {**TP2}), (4, {**PP2, **CP2}), (2, {"global_batch_size": 3})],
    ids=str,
)
def test_step_and_scores(pool: Any, checkpoint: Path, oracle: Any, world: int, layout: dict[str, Any]) -> None:
    loss, wanted, sums = oracle
    for metrics, gradients, scores in pool.run(world, run_cpo, checkpoint, layout):
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["rewards/margins"] == pytest.approx(0.05 * (sums[:, 0] - sums[:, 1]).mean().item(), rel=1e-4)
        for name, gradient in gradients.items():
            assert relative_error(gradient, wanted[name]) < 1e-5, name
        assert scores.dtype == np.float32 and scores.shape == (8, 2)
        np.testing.assert_allclose(scores, sums.numpy(), rtol=1e-5)
