"""A new objective is a class and a line in the registry: nothing else changes for it.

Two objectives are registered here, both without slopes in closed form. They go through command line, YAML file, both
heads, layouts and the verifier's loss:

* Ranking: the distance of two summed log-probs from a fixed margin, with an NLL term.
* SPPO (arXiv 2405.00675, TRL's `sppo_hard`) compares with a reference model, reports metrics of its own, and has two
  flags for one value.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from simpo_megatron import objectives
from simpo_megatron.config.arguments import build_parser, flat, parse
from simpo_megatron.data import Pairs
from simpo_megatron.errors import UserError
from simpo_megatron.objectives import OBJECTIVES, Metric, Objective, PairScores
from simpo_megatron.objectives.measured import PAIR_METRICS
from simpo_megatron.settings import setting
from simpo_megatron.verify.compare import reference_loss, reference_scores
from tests.support.distributed import WorkerPool
from tests.support.families import on_disk
from tests.support.steps import (
    CASES,
    NAN,
    build_engine,
    command_line,
    gather_gradients,
    one_thread,
    relative_error,
    response_logps,
)
from tests.support.tiny import make_checkpoint
from tests.test_layouts import CP2, PP2, TP2


@dataclass(frozen=True)
class Ranking(Objective):
    """Ranking."""

    name: ClassVar[str] = "ranking"
    own_nll_weight: ClassVar[float] = 1.0
    ranking_scale: float = setting(0.1, "scale of the rewards")
    ranking_margin: float = setting(1.0, "target of the margin")

    def pair_losses(self, scores: PairScores) -> torch.Tensor:
        rewards_PM = self.rewards(scores)
        return (rewards_PM[:, 0] - rewards_PM[:, 1] - self.ranking_margin).square()

    def rewards(self, scores: PairScores) -> torch.Tensor:
        return self.ranking_scale * scores.sums_PM

    def describe(self) -> str:
        return f"Ranking: scale {self.ranking_scale:g}"


@dataclass(frozen=True)
class SPPO(Objective):
    """SPPO."""

    name: ClassVar[str] = "sppo"
    metrics: ClassVar[tuple[Metric, ...]] = (
        *PAIR_METRICS,
        Metric("logps/summed_chosen", lambda found: found.scores.sums_PM[:, 0]),
        Metric("kl_a_token", lambda found: found.scores.log_ratios_PM[:, 0], "chosen_tokens"),
    )
    needs_reference: ClassVar[bool] = True
    drops: ClassVar[Mapping[str, str]] = {"sppo_beta": "sppo_temperature", "sppo_temperature": "sppo_beta"}
    sppo_beta: float | None = setting(None, "scale of the rewards")
    sppo_temperature: float | None = setting(None, "the same, as 1 / beta")

    @property
    def beta(self) -> float:
        return self.sppo_beta or 1 / (self.sppo_temperature or 10.0)

    def pair_losses(self, scores: PairScores) -> torch.Tensor:
        target = 0.5 / self.beta
        return (scores.log_ratios_PM - scores.sums_PM.new_tensor([target, -target])).square().sum(1)

    def rewards(self, scores: PairScores) -> torch.Tensor:
        return self.beta * scores.log_ratios_PM

    def describe(self) -> str:
        return f"SPPO: beta {self.beta:g}"


SETTINGS: dict[str, dict[str, Any]] = {
    "ranking": {"objective": "ranking", "ranking_scale": 0.05, "ranking_margin": 0.4, "nll_weight": 0.4},
    "sppo": {"objective": "sppo", "sppo_beta": 0.08},
}


@contextmanager
def registration() -> Iterator[None]:
    """Within it the two objectives have their line in the registry."""
    OBJECTIVES.update({cls.name: cls for cls in (Ranking, SPPO)})
    try:
        yield
    finally:
        for cls in (Ranking, SPPO):
            del OBJECTIVES[cls.name]


@pytest.fixture
def registered() -> Iterator[None]:
    with registration():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def test_its_flags_are_there(registered: None, checkpoint: Path) -> None:
    config = parse(command_line(checkpoint, SETTINGS["ranking"]))
    assert config.objective == Ranking(0.05, 0.4, nll_weight=0.4)
    assert {name: flat(config)[name] for name in SETTINGS["ranking"]} == SETTINGS["ranking"]
    text = " ".join(build_parser().format_help().split())
    for words in ("Ranking", "--ranking-margin X target of the margin (default", "SPPO", "--sppo-beta X", "sppo}"):
        assert words in text


def test_its_keys_work_in_the_file_and_flags_win(registered: None, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("objective: ranking\nranking_scale: 0.3\nnll_weight: 2\nnll_normalizer: pair")
    argv = [*command_line(checkpoint, {}), "--config", str(file)]
    assert parse(argv).objective == Ranking(0.3, nll_weight=2.0, nll_normalizer="pair")
    again = parse([*argv, "--ranking-scale", "0.7"]).objective
    assert again == Ranking(0.7, nll_weight=2.0, nll_normalizer="pair")
    with pytest.raises(UserError, match=r"run.yaml: ranking_scale belongs to --objective ranking and has no effect"):
        parse([*argv, "--objective", "sppo"])
    file.write_text("objective: sppo\nsppo_temperature: 4")
    assert parse(argv).objective == SPPO(sppo_temperature=4.0)
    assert parse([*argv, "--sppo-beta", "0.5"]).objective == SPPO(sppo_beta=0.5), "one of two flags for one value"
    with pytest.raises(UserError, match="--sppo-beta inf must be a finite number"):
        parse([*argv, "--sppo-beta", "inf"])


def test_the_example_of_the_readme_is_this_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(objectives.__file__).with_name("README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    module = types.ModuleType("ranking")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look types up
    exec(code, vars(module))
    example = vars(module)["Ranking"](0.05, 0.4)
    sums_PM, nothing = torch.tensor([[-3.0, -9.0], [-8.0, -2.0]]), torch.full((2,), NAN)
    scores = PairScores(sums_PM, torch.ones(2, 2), nothing, nothing)
    torch.testing.assert_close(example.pair_losses(scores), Ranking(0.05, 0.4).pair_losses(scores))
    sums_PM.requires_grad_()
    (wanted,) = torch.autograd.grad(example.pair_losses(scores).sum(), sums_PM)
    torch.testing.assert_close(example.pair_slopes(scores), wanted)
    assert (example.name, example.own_nll_weight) == ("ranking", 1.0)


def test_an_unknown_objective_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("objective: ppo\n")
    with pytest.raises(UserError, match="--objective ppo is not known; use simpo or sft or dpo"):
        parse([*command_line(checkpoint, {}), "--config", str(tmp_path / "run.yaml")])


def pairs_with_reference() -> Pairs:
    """The pairs of the case; the reference log-probs are random numbers."""
    pairs = CASES["columns"].pairs
    sums_PM = -40 * np.random.default_rng(5).random((len(pairs), 2), dtype=np.float32)
    return pairs.with_reference_sums(sums_PM)


Run = tuple[dict[str, float], dict[str, torch.Tensor], np.ndarray]


def run_objective(checkpoint: Path, name: str, layout: dict[str, Any]) -> Run:
    """On a rank: metrics and gradients of the global batch, and the scores of the whole set."""
    from simpo_megatron.trainer.scoring import score_pairs

    with registration():
        engine, hf = build_engine(command_line(checkpoint, {**SETTINGS[name], **layout}))
    pairs = pairs_with_reference()
    metrics = engine.compute_gradients(engine.packer.pack(pairs, np.array(CASES["columns"].indices)))
    gradients = {name: gradient.clone() for name, gradient in gather_gradients(engine, hf).items()}
    return metrics, gradients, score_pairs(engine, pairs)


@dataclass
class Expected:
    """What transformers and the formulas written out say: summed log-probs, and loss and gradients by objective."""

    sums: torch.Tensor
    losses: dict[str, float]
    gradients: dict[str, dict[str, torch.Tensor]]
    metrics: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Expected:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    pairs = pairs_with_reference()
    weight = torch.from_numpy(pairs.columns["weight"]).double()
    known = torch.from_numpy(pairs.reference_sums(np.arange(len(pairs)))).double()
    with one_thread():
        every = [
            [response_logps(model, p, response) for response in both] for p, *both in map(pairs.pair, range(len(pairs)))
        ]
        sums = torch.stack([torch.stack([logps.sum() for logps in both]) for both in every])
        tokens = sum(len(both[0]) for both in every)
        chosen, rejected = sums.unbind(1)
        away = sums - known
        values = {
            "ranking": (weight * (0.05 * (chosen - rejected) - 0.4) ** 2).mean() - 0.4 * chosen.sum() / tokens,
            "sppo": (weight * ((away[:, 0] - 6.25) ** 2 + (away[:, 1] + 6.25) ** 2)).mean(),
        }
        gradients = {}
        for name, loss in values.items():
            model.zero_grad()
            loss.backward(retain_graph=True)
            found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
            gradients[name] = on_disk(model, found)
    margins = {"ranking": 0.05 * (chosen - rejected), "sppo": 0.08 * (away[:, 0] - away[:, 1])}
    metrics = {name: {"rewards/margins": margin.mean().item()} for name, margin in margins.items()}
    metrics["sppo"] |= {
        "logps/summed_chosen": chosen.mean().item(),
        "kl_a_token": away[:, 0].sum().item() / tokens,
    }
    return Expected(sums.detach(), {name: loss.item() for name, loss in values.items()}, gradients, metrics)


@pytest.mark.parametrize(
    "name, world, layout",
    [
        ("ranking", 1, {"head": "plain"}),
        ("ranking", 4, {**PP2, **CP2}),
        ("ranking", 2, {**TP2, "global_batch_size": 3}),
        ("sppo", 1, {}),
        ("sppo", 2, {**CP2, "head": "plain"}),
    ],
    ids=str,
)
def test_step_and_scores(
    pool: WorkerPool, checkpoint: Path, oracle: Expected, name: str, world: int, layout: dict[str, Any]
) -> None:
    for metrics, gradients, scores in pool.run(world, run_objective, checkpoint, name, layout):
        assert metrics["loss"] == pytest.approx(oracle.losses[name], rel=1e-5)
        for key, value in oracle.metrics[name].items():
            assert metrics[key] == pytest.approx(value, rel=1e-4), key
        for key, gradient in gradients.items():
            assert relative_error(gradient, oracle.gradients[name][key]) < 1e-5, key
        assert scores.dtype == np.float32 and scores.shape == (8, 2)
        np.testing.assert_allclose(scores, oracle.sums.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    "objective", [Ranking(0.05, 0.4, nll_weight=0.4), SPPO(0.08)], ids=lambda objective: objective.name
)
def test_the_verifier_computes_its_loss(oracle: Expected, objective: Objective) -> None:
    scores = reference_scores(pairs_with_reference(), list(range(8)), oracle.sums)
    assert reference_loss(objective, scores).item() == pytest.approx(oracle.losses[objective.name], rel=1e-6)


def test_a_reference_that_is_missing_is_a_sentence() -> None:
    nothing = torch.full((2,), NAN)
    with pytest.raises(UserError, match="the objective needs log-probs of a reference model"):
        SPPO().rewards(PairScores(torch.zeros(2, 2), torch.ones(2, 2), nothing, nothing))
