"""The closed forms of an objective's slopes are the derivatives of its losses: both against autograd in fp64.

Most computations here are of a whole microbatch: pair weights, own margins, an NLL term, divisors of a global batch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simpo_megatron.batch.row import BatchCounts
from simpo_megatron.objectives import OBJECTIVES, SFT, Objective, PairScores, SimPO
from simpo_megatron.objectives.cpo import CPO
from simpo_megatron.step import batch_loss, batch_slopes

EVERY = [
    SimPO(),
    SimPO(simpo_beta=2.5, simpo_gamma=1.375),
    SimPO(simpo_beta=10.0, simpo_label_smoothing=0.1),
    SimPO(simpo_loss_type="hinge"),
    SimPO(simpo_sft_weight=0.3),
    SimPO(simpo_length_normalization=False, nll_weight=0.2, nll_normalizer="pair"),
    SFT(),
    SFT(nll_weight=0.5, nll_normalizer="pair"),
    *(kind() for name, kind in OBJECTIVES.items() if name not in ("simpo", "sft")),
]


def random_batch(responses: int) -> tuple[Any, Tensor]:
    """A microbatch of 20 pairs, as far as a loss reads it, and their sums in fp64."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 90, (20, responses), generator=generator)
    margin = torch.full((20,), torch.nan)
    margin[::3] = torch.rand(7, generator=generator)
    weight = (torch.arange(20) % 4) / 2
    known = -lengths * 3 * torch.rand(20, responses, dtype=torch.float64, generator=generator)

    def scores(sums_PM: Tensor) -> PairScores:
        return PairScores(sums_PM, lengths, margin, weight, known)

    batch = SimpleNamespace(scores=scores, weight=weight, counts=BatchCounts(64, 1000, 3))
    return batch, -lengths * 3 * torch.rand(20, responses, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_slopes_are_the_derivative_of_the_loss(objective: Objective) -> None:
    batch, sums = random_batch(objective.responses)
    sums.requires_grad_()
    (wanted,) = torch.autograd.grad(batch_loss(objective, batch, sums), sums)
    got = batch_slopes(objective, batch, sums.detach())
    assert got is not None and wanted.abs().max() > 0
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("margin", [-60.0, 60.0])
def test_small_slopes_are_not_lost_in_fp32(margin: float) -> None:
    """sigmoid(-60) is 9e-27: 1 - sigmoid(60) would be 0."""
    sums = torch.tensor([[margin, 0.0]])
    scores = PairScores(sums, torch.ones(1, 2), torch.full((1,), torch.nan), torch.ones(1))
    objective = SimPO(simpo_beta=1.0, simpo_gamma=0.0)
    wanted = -torch.sigmoid(-sums[:, 0].double())
    torch.testing.assert_close(objective.pair_slopes(scores)[:, 0].double(), wanted, rtol=1e-6, atol=0)


def test_every_objective_of_the_package_has_a_closed_form() -> None:
    for kind in OBJECTIVES.values():
        batch, sums = random_batch(kind.responses)
        assert kind().pair_slopes(batch.scores(sums)) is not None, kind.name


def test_an_objective_without_one_leaves_it_to_autograd() -> None:
    """Also where it is derived from one that has a closed form: that form belongs to another loss."""

    class Other(SimPO):
        name = "other"

        def pair_losses(self, scores: PairScores) -> Tensor:
            return super().pair_losses(scores).square()

    class OtherCPO(CPO):
        name = "other cpo"

        def margin_losses(self, margins_P: Tensor, scores: PairScores) -> Tensor:
            return super().margin_losses(margins_P, scores).square()

    batch, sums = random_batch(2)
    assert batch_slopes(Other(), batch, sums) is None
    assert batch_slopes(OtherCPO(), batch, sums) is None
