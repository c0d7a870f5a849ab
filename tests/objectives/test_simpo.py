"""The SimPO loss against TRL's CPOTrainer.cpo_loss and the formulas of the SimPO repository, values and gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from simpo_megatron.errors import UserError
from simpo_megatron.objectives.simpo import SimPO, simpo_loss


def random_logps(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Average log-probs of 32 chosen and rejected responses, fp64, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = -3 * torch.rand(2, 32, dtype=torch.float64, generator=generator)
    return chosen.requires_grad_(), rejected.requires_grad_()


def trl_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """The loss that TRL's CPOTrainer computes for these average log-probs."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    return cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def assert_same_with_gradients(ours: torch.Tensor, oracle: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Values and gradients are equal to rounding in fp64."""
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.5, 2, ours.shape[0], dtype=ours.dtype)
    got = torch.autograd.grad((weights * ours).sum(), inputs)
    want = torch.autograd.grad((weights * oracle).sum(), inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (2.5, 1.375), (10.0, 3.0), (2.0, 0.0)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_sigmoid_equals_trl(beta: float, gamma: float, label_smoothing: float) -> None:
    inputs = random_logps()
    ours = simpo_loss(*inputs, beta=beta, gamma_P=gamma, label_smoothing=label_smoothing)
    assert_same_with_gradients(ours, trl_loss(*inputs, beta=beta, gamma=gamma, label_smoothing=label_smoothing), inputs)


def test_hinge_equals_the_simpo_repository() -> None:
    chosen, rejected = inputs = random_logps()
    beta, ratio = 2.5, 0.55
    oracle = torch.relu(1 - beta * ((chosen - rejected) - ratio))
    ours = simpo_loss(*inputs, beta=beta, gamma_P=beta * ratio, loss_type="hinge")
    assert_same_with_gradients(ours, oracle, inputs)
    assert not torch.allclose(ours, simpo_loss(*inputs, beta=beta, gamma_P=beta * ratio))


def test_equal_responses_lose_softplus_gamma_and_pull_apart() -> None:
    logps = torch.tensor([-1.5], requires_grad=True)
    loss = simpo_loss(logps, logps, beta=2.0, gamma_P=1.0)
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(1.0)).item())
    assert torch.autograd.grad(loss.sum(), logps)[0].item() == 0


def test_label_smoothing_mixes_in_the_swapped_pair() -> None:
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([-3.0])
    straight = simpo_loss(chosen, rejected, beta=2.0, gamma_P=0.0)
    swapped = simpo_loss(rejected, chosen, beta=2.0, gamma_P=0.0)
    smoothed = simpo_loss(chosen, rejected, beta=2.0, gamma_P=0.0, label_smoothing=0.1)
    torch.testing.assert_close(smoothed, 0.9 * straight + 0.1 * swapped)


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_huge_margins_stay_finite(margin: float) -> None:
    chosen = torch.tensor([margin], requires_grad=True)
    loss = simpo_loss(chosen, torch.zeros(1), beta=10.0, gamma_P=1.0, label_smoothing=0.1)
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), chosen)[0].isfinite().all()


def test_gamma_of_one_pair_is_its_own() -> None:
    chosen, rejected = random_logps()
    gammas = torch.linspace(0, 2, 32, dtype=torch.float64)
    ours = simpo_loss(chosen, rejected, beta=2.0, gamma_P=gammas)
    each = [simpo_loss(chosen[i : i + 1], rejected[i : i + 1], beta=2.0, gamma_P=gammas[i].item()) for i in range(32)]
    torch.testing.assert_close(ours, torch.cat(each))


def test_unknown_loss_type() -> None:
    with pytest.raises(ValueError, match="sigmoid or hinge"):
        simpo_loss(torch.zeros(1), torch.zeros(1), beta=1.0, gamma_P=0.0, loss_type="ipo")


@pytest.mark.parametrize(
    "settings, gamma",
    [
        ({"simpo_beta": 2.5, "simpo_gamma_beta_ratio": 0.55}, 1.375),  # the paper's Llama-3-Instruct row
        ({"simpo_beta": 2.5, "simpo_gamma": 1.375}, 1.375),
        ({"simpo_beta": 2.5, "simpo_gamma": 1.4}, 1.4),  # the original recipe: an absolute gamma, not a ratio of 1.4
        ({"simpo_beta": 2.0}, 1.0),
        ({"simpo_beta": 2.0, "simpo_gamma": 0.0}, 0.0),
    ],
)
def test_gamma_and_its_ratio_meet(settings: dict[str, Any], gamma: float) -> None:
    assert math.isclose(SimPO(**settings).gamma, gamma)


def test_gamma_and_ratio_together_are_refused() -> None:
    with pytest.raises(UserError, match="--simpo-gamma and --simpo-gamma-beta-ratio"):
        SimPO(simpo_gamma=1.0, simpo_gamma_beta_ratio=0.5)
