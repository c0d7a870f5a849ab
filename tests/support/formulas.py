"""The losses of the objectives, each written out from its paper for one pair, in plain torch.

Shapes: none; every number is a scalar of one pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """What a formula sees: a and b are the summed log-probs of the chosen and the rejected response.

    Attributes:
        a: of the chosen response.
        b: of the rejected response.
        n: tokens of the chosen response.
        m: tokens of the rejected response.
        a0: a under the reference model.
        b0: b under the reference model.
    """

    a: Tensor
    b: Tensor
    n: int
    m: int
    a0: float = float("nan")
    b0: float = float("nan")

    @property
    def u(self) -> Tensor:
        """The summed log-ratio of the chosen response."""
        return self.a - self.a0

    @property
    def v(self) -> Tensor:
        """The summed log-ratio of the rejected response."""
        return self.b - self.b0


Settings = Mapping[str, Any]
Formula = Callable[[Pair, Settings], tuple[Tensor, Tensor, Tensor]]  # the loss, and the rewards of both responses


def _odds(average: Tensor) -> Tensor:
    return average.exp() / (1 - average.exp())


def _dpo(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    z, smoothing = s["dpo_beta"] * (p.u - p.v), s.get("dpo_label_smoothing", 0.0)
    loss = -(1 - smoothing) * torch.log(torch.sigmoid(z)) - smoothing * torch.log(torch.sigmoid(-z))
    return loss, s["dpo_beta"] * p.u, s["dpo_beta"] * p.v


def _ln_dpo(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected = s["ln_dpo_beta"] * p.u / p.n, s["ln_dpo_beta"] * p.v / p.m
    return F.softplus(rejected - chosen), chosen, rejected


def _rdpo(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    beta = s["rdpo_beta"]
    return F.softplus(-(beta * (p.u - p.v) + s["rdpo_alpha"] * (p.n - p.m))), beta * p.u, beta * p.v


def _ipo(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    beta = s["ipo_beta"]
    h = p.u - p.v if s.get("ipo_form") == "sum" else p.u / p.n - p.v / p.m
    return (h - 1 / (2 * beta)) ** 2, beta * p.u, beta * p.v


def _cpo(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    beta = s["cpo_beta"]
    return F.softplus(-beta * (p.a - p.b)), beta * p.a, beta * p.b


def _orpo(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected, weight = p.a / p.n, p.b / p.m, s["orpo_lambda"]
    ratio = _odds(chosen) / _odds(rejected)
    return -chosen + weight * F.softplus(-ratio.log()), weight * chosen, weight * rejected


def _slic(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    return torch.clamp(s["slic_delta"] - p.a + p.b, min=0), p.a, p.b


def _rrhf(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected = p.a / p.n, p.b / p.m
    return torch.clamp(rejected - chosen, min=0), chosen, rejected


def _kto(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    beta, baseline = s["kto_beta"], s.get("baseline", 0.0)
    chosen = 1 - torch.sigmoid(beta * p.u - baseline)
    rejected = 1 - torch.sigmoid(baseline - beta * p.v)
    loss = s.get("kto_desirable_weight", 1.0) * chosen + s.get("kto_undesirable_weight", 1.0) * rejected
    return loss, beta * p.u, beta * p.v


def _simpo_sums(p: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    beta = s["simpo_beta"]
    return F.softplus(-(beta * (p.a - p.b) - s["simpo_gamma"])), beta * p.a, beta * p.b


FORMULAS: dict[str, Formula] = {
    "dpo": _dpo,
    "ln-dpo": _ln_dpo,
    "rdpo": _rdpo,
    "ipo": _ipo,
    "cpo": _cpo,
    "orpo": _orpo,
    "slic": _slic,
    "rrhf": _rrhf,
    "kto": _kto,
    "simpo": _simpo_sums,  # the ablation without length normalization
}
# The settings of each case: (weight of the NLL term, its divisor, settings of the objective).
TERMS: dict[str, tuple[float, str, dict[str, Any]]] = {
    "dpo": (0.0, "token", {"objective": "dpo", "dpo_beta": 0.08}),
    "dpo, smoothed": (
        0.3,
        "token",
        {"objective": "dpo", "dpo_beta": 0.05, "dpo_label_smoothing": 0.1, "nll_weight": 0.3},
    ),
    "ln-dpo": (0.0, "token", {"objective": "ln-dpo", "ln_dpo_beta": 1.5}),
    "rdpo": (0.0, "token", {"objective": "rdpo", "rdpo_beta": 0.05, "rdpo_alpha": 0.07}),
    "ipo": (0.0, "token", {"objective": "ipo", "ipo_beta": 0.3}),
    "ipo, sums": (0.0, "token", {"objective": "ipo", "ipo_beta": 0.02, "ipo_form": "sum"}),
    "cpo": (1.0, "token", {"objective": "cpo", "cpo_beta": 0.05}),
    "cpo, the paper's": (
        0.2,
        "pair",
        {"objective": "cpo", "cpo_beta": 0.1, "nll_weight": 0.2, "nll_normalizer": "pair"},
    ),
    "orpo": (0.0, "token", {"objective": "orpo", "orpo_lambda": 0.5}),
    "slic": (1.0, "pair", {"objective": "slic", "slic_delta": 2.0}),
    "rrhf": (0.5, "pair", {"objective": "rrhf", "nll_weight": 0.5}),
    "kto": (
        0.2,
        "token",
        {
            "objective": "kto",
            "kto_beta": 0.05,
            "kto_desirable_weight": 0.7,
            "kto_undesirable_weight": 1.4,
            "nll_weight": 0.2,
        },
    ),
    "simpo, sums": (
        0.0,
        "token",
        {
            "objective": "simpo",
            "simpo_beta": 0.1,
            "simpo_gamma": 0.5,
            "no_simpo_length_normalization": True,
        },
    ),
}
# TRL's `logps/*` are sums for these; the averages have names of their own.
SUMS = ("dpo", "ln-dpo", "rdpo", "ipo", "cpo", "slic", "kto")
