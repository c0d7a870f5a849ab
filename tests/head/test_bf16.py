"""`LogProbHead` in bf16: as exact as rounding allows, on processors with bf16 arithmetic and on those without.

The bounds are derived from the rounding (`Problem.bf16_errors`), so they hold on any processor.
"""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn

import pytest
import torch

from simpo_megatron import compat
from simpo_megatron.head import kernels, layer, projection, slabs
from tests.support.distributed import WorkerPool
from tests.support.head_problems import SCALE, Problem, bf16_arithmetic, build_head, products, score, sigmoid


def bf16_errors(native: bool, confident: bool, way: str | None = None) -> list[tuple[float, float, float]]:
    """On a rank: of the sums and both gradients the error of the head, of the plain path, and the predicted one.

    Args:
        native: compute as on a processor with bf16 arithmetic, or as on one without.
        confident: see `Problem`.
        way: how products are added, if not as on this processor; see `products`.
    """
    from simpo_megatron.head.logprobs import vocab_parallel_logprobs

    small = {"dtype": torch.bfloat16, "hidden_size": 64, "vocab": 1000, "padded": 1024}
    problem = Problem(((5, 60, 40), (9, 33, 70)) * 8, **small, confident=confident)
    _, sums, *wanted = problem.oracle(sigmoid)

    with bf16_arithmetic(native), contextlib.nullcontext() if way is None else products(way):
        head, weight = build_head(problem, 1, False, 1, 70 * 1024 * (2 if native else 4))  # every pair is too large
        _, fused_sums, _, fused_hidden = score(problem, head, weight, sigmoid)
    assert fused_sums.dtype == torch.float32 and fused_hidden.dtype == weight.grad.dtype == torch.bfloat16
    fused = (fused_sums, fused_hidden[: len(problem.hidden), 0], weight.grad)

    hidden, plain_weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    logits = hidden[problem.positions] @ plain_weight.T
    logps = vocab_parallel_logprobs(logits, problem.targets[problem.positions], 1000)
    plain_sums = logps.new_zeros(32).index_add(0, problem.segments, logps).view(16, 2)
    (SCALE * sigmoid(plain_sums, problem.lengths_PM)).backward()
    plain = (plain_sums.detach(), hidden.grad, plain_weight.grad)

    def error(got: torch.Tensor, right: torch.Tensor) -> float:
        return float((got.double() - right).norm() / right.norm())

    right = (sums, *wanted)
    return list(
        zip(map(error, fused, right), map(error, plain, right), problem.bf16_errors(sigmoid, native), strict=True)
    )


def too_far(fused: float, plain: float, predicted: float) -> bool:
    """Whether an error is larger than rounding explains, or clearly larger than that of the plain path.

    The head rounds a product for every slab, the plain path one for all: this allows 5 %. fp32 sums may add 1e-6.
    """
    return fused > 1.5 * predicted + 1e-6 or fused > 1.05 * plain + 1e-6


NATIVE = pytest.mark.parametrize("native", [True, False], ids=["native bf16", "emulated bf16"])
CONFIDENT = pytest.mark.parametrize("confident", [False, True], ids=["any target", "confident"])


@CONFIDENT
@NATIVE
def test_bf16_is_as_exact_as_rounding_allows(pool: WorkerPool, native: bool, confident: bool) -> None:
    """Both ways of computing, whichever processor this is."""
    [errors] = pool.run(1, bf16_errors, native, confident)
    assert not any(too_far(*found) for found in errors), errors


@CONFIDENT
@pytest.mark.parametrize("way", ["addmm", "mm", "cast"])
def test_the_ways_of_a_gpu_are_as_exact(pool: WorkerPool, way: str, confident: bool) -> None:
    [errors] = pool.run(1, bf16_errors, True, confident, way)
    assert not any(too_far(*found) for found in errors), errors


@pytest.mark.parametrize("way", ["addmm", "mm", "cast"])
def test_the_ways_of_a_gpu_round_no_product(way: str) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b, start = (torch.randn(*shape, generator=generator) for shape in ((40, 300), (300, 50), (40, 50)))
    a, b = a.bfloat16(), b.bfloat16()
    wanted = a.double() @ b.double()
    for add in (False, True):
        out = start.clone()
        with products(way):
            projection._multiply(out, a, b, add, way)
        torch.testing.assert_close(out.double(), wanted + start * add, rtol=1e-5, atol=2e-5)


def refuse(*matrices: Any, **options: Any) -> NoReturn:
    """What `addmm` with `out_dtype` does in torch 2.8 and 2.9."""
    raise RuntimeError("self and mat2 must have the same dtype")


def rounded(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """A product that was rounded to bf16 before it was cast."""
    return (a @ b).to(out_dtype)


@pytest.mark.parametrize(
    "broken, way", [({}, "addmm"), ({"addmm": refuse}, "mm"), ({"addmm": refuse, "mm": rounded}, "cast")]
)
def test_the_way_is_found_by_trying_it(monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any], way: str) -> None:
    """In torch from 2.10 on; in 2.8 and 2.9; in a torch whose product is rounded."""
    device = torch.device("cpu")
    compat.fp32_products.cache_clear()
    assert compat.fp32_products(device) == "cast", "CPUs have neither operator"
    compat.fp32_products.cache_clear()
    with products("not used"):
        for name, function in broken.items():
            monkeypatch.setattr(torch, name, function)
        assert compat.fp32_products(device) == way
        monkeypatch.undo()
    compat.fp32_products.cache_clear()


class Bf16Gradients(projection.Gradients):
    """A mistake: gradients that are summed over the slabs in bf16."""

    @classmethod
    def of(cls, hidden_RH: Any, weight_VH: Any, main_grad: Any, factor: float) -> projection.Gradients:
        made = projection.Gradients.of(hidden_RH, weight_VH, main_grad, factor)
        assert made.weight_VH is not None
        return cls(made.hidden_RH, made.weight_VH.bfloat16(), made.factor)


def rounded_first(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, lse_N: torch.Tensor, by_N: torch.Tensor, softcap: None
) -> None:
    """A mistake: the probability is rounded before the target is subtracted."""
    p_NV = (logits_NV.float() - lse_N[:, None]).exp().bfloat16()
    p_NV.scatter_add_(1, targets_N[:, None], torch.full_like(p_NV[:, :1], -1.0))
    logits_NV.copy_(p_NV.float() * -by_N[:, None])


def rounded_statistics(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, softcap: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A mistake: the log-sum-exp is rounded to bf16."""
    lse_N, target_N = kernels.row_statistics(logits_NV, targets_N)
    return lse_N.bfloat16().float(), target_N


# What is replaced, by what; and where it shows: with native bf16, with confident predictions.
BF16_MISTAKES: dict[str, tuple[Any, str, Any, bool, bool]] = {
    "gradient rounded first": (slabs, "write_gradient_", rounded_first, False, True),
    "statistics in bf16": (slabs, "row_statistics", rounded_statistics, True, False),
    "weight gradient summed in bf16": (layer, "Gradients", Bf16Gradients, False, False),
}


def bf16_errors_with(mistake: str, native: bool, confident: bool) -> list[tuple[float, float, float]]:
    """On a rank: `bf16_errors` of a head that rounds where it must not."""
    owner, name, value, *_ = BF16_MISTAKES[mistake]
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return bf16_errors(native, confident)
    finally:
        setattr(owner, name, before)


@pytest.mark.parametrize("mistake", BF16_MISTAKES)
def test_bf16_mistakes_are_seen(pool: WorkerPool, mistake: str) -> None:
    native, confident = BF16_MISTAKES[mistake][3:]
    [errors] = pool.run(1, bf16_errors_with, mistake, native, confident)
    assert any(too_far(*found) for found in errors), errors
